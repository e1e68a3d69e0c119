"""What a bundle needs of the machine that serves it, and what this machine has."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state

from serve.errors import ShipyardError

KNOWN = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "asimdhp", "i8mm", "sve",
)  # fmt: skip
"""Instruction sets that ONNX Runtime chooses kernels by, by Linux's names."""

ENGINE = {
    "name": "onnxruntime",
    "minimum": "1.23",
    "instructions": {"x86_64": ["avx2"], "aarch64": ["asimd"]},
}
"""The oldest engine and the least processor of each architecture that a bundle is made for."""

FAULTS: tuple[type[Exception], ...] = tuple(
    found
    for found in vars(onnxruntime_pybind11_state).values()
    if isinstance(found, type) and issubclass(found, Exception)
)
"""What the engine raises of a graph: classes of its own that have no base in common."""


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return which of `KNOWN` this machine has, in that order; nothing where Linux does not tell."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return [known for known in KNOWN if known in value.split()]
    return []


def machine() -> dict[str, Any]:
    """Return what figures and weights were made on: `architecture` and `instructions`."""
    return {"architecture": platform.machine(), "instructions": instructions()}


def check_engine(engine: Mapping[str, Any], where: str) -> None:
    """Refuse a bundle that this engine or this processor cannot run.

    Raises:
        ShipyardError: another engine, an older version than the bundle needs, an architecture that it is not made for, or
            an instruction set that is missing.
    """
    if engine.get("name") != ENGINE["name"]:
        raise ShipyardError(f"{where}: made for another engine", value=str(engine.get("name")), allowed="onnxruntime")
    minimum = str(engine.get("minimum"))
    if _version(ort.__version__) < _version(minimum):
        raise ShipyardError(
            f"{where}: needs a newer engine", value=f"onnxruntime {ort.__version__}", allowed=f"{minimum} or newer",
            mend="install what the bundle's requirements name",
        )  # fmt: skip
    needed, architecture = engine.get("instructions", {}), platform.machine()
    if architecture not in needed:
        raise ShipyardError(f"{where}: not made for this architecture", value=architecture, allowed=", ".join(needed))
    have = instructions()
    # a system that does not tell is tried: the golden answers come next
    if have and (missing := [name for name in needed[architecture] if name not in have]):
        raise ShipyardError(
            f"{where}: this processor lacks instructions", value=", ".join(missing), allowed=", ".join(needed[architecture]),
            mend="serve from a newer machine type",
        )  # fmt: skip


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in text.split(".")[:3])
