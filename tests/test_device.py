"""Training on a GPU: the same losses as on the CPU, every method, and going on elsewhere. Needs one: `make test-gpu`."""

from pathlib import Path

import pytest
import torch

from models import trunk
from models.config import load_fleet
from serve.files import sha256_file
from shipyard import train
from shipyard.joint import Trainer
from shipyard.pretrained import base_folder
from shipyard.tower import encode, pretrain, train_tower
from tests.test_behaviour import write
from tests.test_finetune import Interrupted, training
from tests.test_joint import NAMES, draw, model, quiet, vectors_of

FLEET = load_fleet(Path(__file__).resolve().parent.parent / "fleet.toml")

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU that PyTorch sees: make test-gpu where there is"
)


@pytest.fixture(scope="module", params=[True, False], ids=["a log", "no log"])
def shop(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("shop")
    return write(folder) if request.param else write(folder, searches=[])


def test_a_gpu_that_is_hidden_is_not_used(monkeypatch):
    assert train.device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.device() == torch.device("cpu") and train.device_name(train.device()) == "cpu"
    assert train.peak_memory(train.device()).keys() == {"memory_mb"}


@needs_gpu
def test_a_step_has_the_losses_and_gradients_of_the_cpu(shop):
    found = {}
    for where in (torch.device("cpu"), train.device()):
        joint = model(shop).to(where)  # not in training mode: nothing is dropped
        trainer = Trainer(joint, shop, vectors_of(shop), dict.fromkeys(NAMES, 1.0))
        losses = trainer.losses(draw(trainer, 10_000))
        sum(losses.values()).backward()
        gradients = {name: p.grad.cpu() for name, p in joint.named_parameters() if p.grad is not None}
        found[where.type] = ({name: float(loss) for name, loss in losses.items()}, gradients)
    (cpu, slopes), (gpu, steep) = found["cpu"], found["cuda"]
    assert gpu == pytest.approx(cpu, rel=1e-5)
    assert steep.keys() == slopes.keys()
    for name, gradient in slopes.items():
        assert (steep[name] - gradient).abs().max() <= 1e-4 * max(1e-3, float(gradient.abs().max())), name


@needs_gpu
@pytest.mark.parametrize("method", ["full", "lora", "adalora"])
def test_every_method_trains_the_tower(shop, method, tmp_path):
    profile = FLEET.profile["quick"].model_copy(update={"tower_steps": 24, "tower_batch": 8, "mlm_steps": 3})
    config = FLEET.finetune.model_copy(update={"method": method, "rank": 4})
    tower, tokenizer = trunk.load_tower(base_folder(FLEET))
    texts = shop.texts[:3]
    on_cpu = encode(tower, tokenizer, texts, quiet, "")
    tower.to(train.device())
    before = encode(tower, tokenizer, texts, quiet, "")
    assert before.device.type == "cpu" and (before - on_cpu).abs().max() < 1e-5
    said = pretrain(tower, tokenizer, shop, config, profile, tmp_path, quiet)
    assert said["steps"] == 3
    said = train_tower(tower, tokenizer, shop, config, profile, tmp_path, quiet)
    after = encode(tower, tokenizer, texts, quiet, "")
    assert said["weights_moved"] > 0 and (after - before).norm(dim=1).min() > 1e-4
    assert method == "full" or said["merge_error"] < 1e-4
    assert tower.device.type == "cuda"
    assert train.peak_memory(tower.device)["gpu_memory_mb"] > 50


@needs_gpu
def test_what_was_begun_on_a_gpu_goes_on_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    there = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Linear(16, 1))
    broken = training(there.to("cuda"), stop=17)
    monkeypatch.setattr(torch, "from_numpy", _on("cuda", torch.from_numpy))
    with pytest.raises(Interrupted):
        broken.run(tmp_path, quiet)
    [checkpoint] = tmp_path.glob("*.pt")
    was = sha256_file(checkpoint)
    monkeypatch.setattr(torch, "from_numpy", torch.from_numpy.__wrapped__)
    here = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Linear(16, 1))
    said = training(here).run(tmp_path, quiet)
    assert said["steps"] == 30 and sha256_file(checkpoint) != was
    assert all(p.device.type == "cpu" and torch.isfinite(p).all() for p in here.parameters())


def _on(device, made):
    def there(array):
        return made(array).to(device)

    there.__wrapped__ = made
    return there
