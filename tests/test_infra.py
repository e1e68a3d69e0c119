"""The stacks, built in process from a sample release: properties one by one, and a snapshot of each template."""

import hashlib
import json
import os
import re
from pathlib import Path

import aws_cdk as cdk
import cfnlint.api
import pytest
from aws_cdk.assertions import Match, Template
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import app
from infra import hosting, network
from infra.template import fill
from models.config import Environment, load_fleet
from models.release import (
    File,
    ShipyardError,
    artifact_key,
    attest,
    dump,
    files_digest,
    sign,
)

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOTS = Path(__file__).parent / "snapshots"
CONTEXT = json.loads((ROOT / "cdk.json").read_text())["context"]

ACCOUNT = "123456789012"
BUCKET = f"shipyard-dev-artifacts-{ACCOUNT}-us-east-1"
IMAGE = f"shipyard/recommend@sha256:{'ab' * 32}"
STACKS = ("storage", "network", "gpu", "cpu", "edge", "gateway")


# --- a sample release ------------------------------------------------------------------------------------------------


def artifact(name, target, kind, template, content="1"):
    file = File(path="bundle.json", sha256=hashlib.sha256(f"{name} {content}".encode()).hexdigest(), bytes=7)
    digest = files_digest((file,))
    return {
        "name": name,
        "submodel": None,
        "target": target,
        "kind": kind,
        "key": artifact_key(name, digest),
        "digest": digest,
        "manifest": file.sha256,
        "files": [file.model_dump()],
        "template": template,
    }


def recipe(name, uri):
    return {
        "RecipeFormatVersion": "2020-01-25",
        "ComponentName": name,
        "ComponentVersion": "0.1.0",
        "Manifests": [
            {
                "Platform": {"os": "linux", "runtime": "*"},
                "Lifecycle": {"install": {"Script": 'sh "{artifacts:decompressedPath}/install.sh"'}},
                "Artifacts": [{"Uri": f"s3://@BUCKET@/{uri}", "Unarchive": "ZIP"}],
            }
        ],
    }


def search(content="1"):
    environment = {"SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": "search", "SAGEMAKER_TRITON_LOG_VERBOSE": "false"}
    template = {"environment": environment, "model_data": "model_repository/"}
    return artifact("search", "gpu", "triton", template, content)


def recommend(content="1"):
    template = {
        "environment": {"ORT_DISABLE_TELEMETRY": "1", "SHIPYARD_TRUSTED_KEY": "@TRUSTED_KEY@"},
        "fetch": ["-m", "serve.fetch", "s3://@BUCKET@/part/", "--attestation", "@ATTESTATION@", "--into", "/model"],
        "serve": ["-m", "serve.server", "--bundle", "/model"],
        "port": 8080,
        "health": "/readyz",
        "mount": "/model",
    }
    made = artifact("recommend", "cpu", "image-context", template, content)
    template["fetch"][2] = f"s3://@BUCKET@/{made['key']}"
    return made


def gateway():
    template = recommend()["template"] | {
        "serve": [
            *("-m", "serve.gateway", "--bundle", "/model", "--artifact", "gateway", "--host", "0.0.0.0"),
            *("--port", "8080", "--search", "sagemaker:@ENDPOINT@", "--cluster", "@CLUSTER_URL@"),
            *("--feedback", "firehose:@FEEDBACK_STREAM@"),
        ]
    }
    return artifact("gateway", "cpu", "gateway", template)


def edge(kind, **changes):
    name = f"edge-{kind}"
    template = {"recipe": recipe(f"com.example.{kind}", f"artifacts/{name}/part.zip") | changes}
    if kind == "model":
        template["model"] = f"com.example.model/0.1.0/{name}/@ATTESTATION@"
    return artifact(name, "edge", f"greengrass-{kind}", template)


def sample(key, *artifacts):
    """Return the body of a release with one artifact of each kind, or with the artifacts that are given."""
    artifacts = artifacts or (search(), recommend(), edge("runtime"), edge("model"), gateway())
    sha256 = "0" * 64
    digests = {"data_sha256": sha256, "base_sha256": sha256, "code_sha256": sha256}
    return {
        "profile": "small",
        "source": {"data": "sample", "base": "sample", "libraries": {}, **digests},
        "submodels": {},
        "fusion": None,
        "artifacts": [part | {"attestation": attest(part["name"], part["manifest"], key)} for part in artifacts],
    }


def write_release(folder):
    """Write a signed sample release, and its key into `keys` beside it; return its path."""
    key = Ed25519PrivateKey.generate()
    release = sign(sample(key), "0.1.0", key)
    (folder / "keys").mkdir(parents=True)
    text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / "keys" / "signer.pub").write_bytes(text + b"\n")
    path = folder / f"{release.version}.json"
    path.write_text(dump(release))
    return path


# --- the stacks of it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def signer(key):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


ENVIRONMENT = {
    "account": ACCOUNT,
    "region": "us-east-1",
    "zones": ("us-east-1a", "us-east-1b"),
    "cidr": "10.40.0.0/16",
    "release": "unused",
    "gpu": {"instance_type": "ml.g5.xlarge", "instances": 2},
    "cpu": {"cpu": 1024, "memory_mib": 2048, "tasks": 3, "image": IMAGE},
    "edge": {"thing_group": "shipyard-dev", "nucleus_version": "2.16.0", "token_exchange_version": "2.0.3"},
}


def fleet_of(*, following=None, **changes):
    """The fleet of the repository, with one environment whose values do not change with those of fleet.toml.

    A change that is a table is merged into that of the environment; `following` are others beside it.
    """
    merged = {
        key: {**ENVIRONMENT.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    fleet = load_fleet(ROOT / "fleet.toml")
    project = fleet.project.model_copy(update={"name": "shipyard"})
    env = Environment(**{**ENVIRONMENT, **merged})
    others = {name: Environment(**{**ENVIRONMENT, **more}) for name, more in (following or {}).items()}
    return fleet.model_copy(update={"project": project, "env": {"dev": env, **others}})


def make_stage(*artifacts, shadow=None, **changes):
    """Build the stacks of a release of these artifacts, for the sample environment with changes."""
    key = Ed25519PrivateKey.from_private_bytes(b"a key of the tests".ljust(32))
    signer = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return app.FleetStage(
        cdk.App(context=CONTEXT),
        "dev",
        fleet=fleet_of(**changes),
        release=sign(sample(key, *artifacts), "0.1.0", key),
        shadow=sign(sample(key, *shadow), "0.1.0", key) if shadow else None,
        signer=signer,
    )


def template_of(stage, name):
    return Template.from_stack(stage.node.find_child(name))


@pytest.fixture(scope="module")
def build(key, signer):
    """A function from artifacts to the stage of their release."""

    def stage(*artifacts, region="us-east-1", **edge):
        fleet = fleet_of()
        changed = fleet.env["dev"].edge.model_copy(update=edge)
        env = fleet.env["dev"].model_copy(update={"region": region, "edge": changed})
        return app.FleetStage(
            cdk.App(context=CONTEXT),
            "dev",
            fleet=fleet.model_copy(update={"env": {"dev": env}}),
            release=sign(sample(key, *artifacts), "0.1.0", key),
            signer=signer,
        )

    return stage


@pytest.fixture(scope="module")
def stage(build):
    return build()


def read(stage):
    return {name: Template.from_stack(stage.node.find_child(name)) for name in STACKS}


@pytest.fixture(scope="module")
def templates(stage):
    return read(stage)


@pytest.fixture(scope="module")
def bodies(templates):
    return {name: template.to_json() for name, template in templates.items()}


@pytest.fixture(scope="module")
def version(key):
    return sign(sample(key), "0.1.0", key).version


def only(template, kind):
    """Return the properties of the one resource of a kind."""
    (resource,) = template.find_resources(kind).values()
    return resource.get("Properties", {})


def logical_id(template, kind):
    """Return the logical id of the one resource of a kind."""
    (name,) = template.find_resources(kind)
    return name


def plain(value):
    """Return a value in which imports and references of the artifact bucket and the key are plain text."""
    text = json.dumps(value)
    named = (("Artifacts82DD59A1Arn", "<bucket>"), ("Data666C94C7Arn", "<data>"), ("Key961B73FDArn", "<key>"))
    for what, mark in named:
        text = re.sub(rf'\{{"Fn::ImportValue": "[^"]*{what}[^"]*"\}}', f'"{mark}"', text)
    text = re.sub(r'\{"Fn::Join": \["", \["(<bucket>|<data>)", "([^"]*)"\]\]\}', r'"\1\2"', text)
    return json.loads(text)


def statements(role):
    """Return the statements of a role's inline policy as {action or actions: (resources, condition)}."""
    (policy,) = role["Policies"]
    found = {}
    for statement in plain(policy["PolicyDocument"]["Statement"]):
        actions = statement["Action"]
        name = actions if isinstance(actions, str) else " ".join(actions)
        resources = statement["Resource"]
        found[name] = (resources if isinstance(resources, list) else [resources], statement.get("Condition"))
    return found


def walk(value, path=()):
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from walk(child, (*path, key))


# --- all of them -----------------------------------------------------------------------------------------------------

# Where a policy has to name every resource, by the actions of its statement. A key policy is left out: its "*" is the
# key that it belongs to.
EVERY_RESOURCE = {
    "ecr:GetAuthorizationToken": "the action knows no resource",
    "ec2:DescribeDhcpOptions ec2:DescribeNetworkInterfaces ec2:DescribeSecurityGroups ec2:DescribeSubnets"
    " ec2:DescribeVpcs ecr:GetAuthorizationToken": "the actions know no resource",
    "ecr:BatchCheckLayerAvailability ecr:BatchGetImage ecr:GetAuthorizationToken ecr:GetDownloadUrlForLayer": (
        "an endpoint's policy: it bounds accounts and actions, roles name resources"
    ),
    "firehose:PutRecord firehose:PutRecordBatch": "an endpoint's policy, as above",
    "sagemaker:InvokeEndpoint": "an endpoint's policy, as above",
    "logs:CreateLogStream logs:PutLogEvents": "an endpoint's policy, as above",
    "elasticloadbalancing:DescribeListeners elasticloadbalancing:DescribeRules"
    " elasticloadbalancing:DescribeTargetGroups elasticloadbalancing:DescribeTargetHealth": (
        "the actions know no resource"
    ),
    "cloudwatch:PutMetricData": "the action knows no resource; its namespaces are bounded by a condition",
    "greengrass:GetComponentVersionArtifact greengrass:GetDeploymentConfiguration"
    " greengrass:ListThingGroupsForCoreDevice greengrass:ResolveComponentCandidates": (
        "Amazon's components lie in its own account, and ids of deployments are not known before they are made"
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_nothing_is_open_to_the_internet(bodies, name):
    text = json.dumps(bodies[name])
    assert "0.0.0.0/0" not in text and "::/0" not in text
    for resource in bodies[name]["Resources"].values():
        if resource["Type"] == "AWS::EC2::SecurityGroup":
            # without a rule of its own a group may send anything anywhere
            (rule,) = resource["Properties"]["SecurityGroupEgress"]
            assert rule["CidrIp"] == "255.255.255.255/32"
            assert "SecurityGroupIngress" not in resource["Properties"]
        if resource["Type"].startswith("AWS::EC2::SecurityGroup") and "GroupId" in resource["Properties"]:
            assert not {"CidrIp", "CidrIpv6"} & resource["Properties"].keys()


def aslist(value):
    return value if isinstance(value, list) else [value]


def test_a_policy_names_its_resources_or_has_a_reason(bodies):
    unnamed = set()
    for body in bodies.values():
        for path, value in walk(body["Resources"]):
            if isinstance(value, dict) and value.get("Effect") == "Allow" and "KeyPolicy" not in path:
                actions = aslist(value["Action"])
                assert not any(action == "*" or action.endswith(":*") for action in actions), path
                if "Resource" in value and "*" in aslist(value["Resource"]):
                    unnamed.add(" ".join(actions))
    assert unnamed == EVERY_RESOURCE.keys()


@pytest.mark.parametrize("name", STACKS)
def test_no_managed_policy(bodies, name):
    assert "ManagedPolicyArns" not in json.dumps(bodies[name])


@pytest.mark.parametrize("name", STACKS)
def test_what_can_be_tagged_is(bodies, name):
    for resource in bodies[name]["Resources"].values():
        tags = resource["Properties"].get("Tags")
        if isinstance(tags, list):
            tags = {tag["Key"]: tag["Value"] for tag in tags}
        assert tags is None or tags.items() >= {"project": "shipyard", "environment": "dev"}.items()


@pytest.mark.parametrize("name", STACKS)
def test_cfn_lint_finds_no_error(bodies, name):
    matches = cfnlint.api.lint(json.dumps(bodies[name]), regions=["us-east-1"])
    assert [str(match) for match in matches if match.rule.id.startswith("E")] == []


@pytest.mark.parametrize("name", STACKS)
def test_snapshot(bodies, name):
    """Compare a template with its snapshot; SHIPYARD_UPDATE_SNAPSHOTS=1 writes it anew.

    Digests, the release's version and the signer's key are masked: they change with each release, the template should
    not. Logical ids are not: another id is another resource.
    """
    compare_snapshot(name, bodies[name])


def compare_snapshot(name, body):
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    for pattern, mask in (
        (r"ssh-ed25519 [A-Za-z0-9+/=]+", "<key>"),
        (r"[0-9a-f]{16}:[0-9]+:[A-Za-z0-9+/]+=*", "<attestation>"),
        (r"\d+\.\d+\.\d+-g[0-9a-f]{12}", "<version>"),
        (r"\b[0-9a-f]{64}\b", "<sha256>"),
        (r"`[0-9a-f]{12}`", "`<digest>`"),
    ):
        text = re.sub(pattern, mask, text)
    path = SNAPSHOTS / f"{name}.json"
    if os.environ.get("SHIPYARD_UPDATE_SNAPSHOTS") == "1":
        path.write_text(text)
    assert path.read_text() == text, "the template changed; if it should have: SHIPYARD_UPDATE_SNAPSHOTS=1"


def test_stacks_have_names_and_an_order(stage):
    stacks = {name: stage.node.find_child(name) for name in STACKS}
    assert {name: stack.stack_name for name, stack in stacks.items()} == {
        name: f"shipyard-dev-{name}" for name in STACKS
    }
    needs = {name: {other.node.id for other in stack.dependencies} for name, stack in stacks.items()}
    assert needs == {
        "storage": set(),
        "network": {"storage"},
        "gpu": {"storage", "network"},
        "cpu": {"storage", "network"},
        "edge": {"storage"},
        "gateway": {"storage", "network", "gpu", "cpu"},
    }


@pytest.mark.parametrize("name", ("gpu", "cpu", "edge", "gateway"))
def test_release_is_an_output(templates, version, name):
    templates[name].has_output("Release", {"Value": version})


# --- storage ---------------------------------------------------------------------------------------------------------


def test_artifact_bucket(templates):
    templates["storage"].has_resource(
        "AWS::S3::Bucket",
        {
            "DeletionPolicy": "RetainExceptOnCreate",
            "UpdateReplacePolicy": "Retain",
            "Properties": {
                "BucketName": BUCKET,
                "VersioningConfiguration": {"Status": "Enabled"},
                "BucketEncryption": {
                    "ServerSideEncryptionConfiguration": [
                        {
                            "BucketKeyEnabled": True,
                            "ServerSideEncryptionByDefault": {
                                "SSEAlgorithm": "aws:kms",
                                "KMSMasterKeyID": {"Fn::GetAtt": ["Key961B73FD", "Arn"]},
                            },
                        }
                    ]
                },
                "LoggingConfiguration": {"DestinationBucketName": Match.any_value(), "LogFilePrefix": "artifacts/"},
            },
        },
    )
    assert "." not in BUCKET  # Greengrass lite cannot read from a bucket with dots


def test_every_bucket_is_private_and_wants_tls(templates):
    buckets = templates["storage"].find_resources("AWS::S3::Bucket")
    assert len(buckets) == 3
    for bucket in buckets.values():
        assert bucket["DeletionPolicy"] == "RetainExceptOnCreate" and bucket["UpdateReplacePolicy"] == "Retain"
        assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
        assert bucket["Properties"]["OwnershipControls"] == {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
    policies = templates["storage"].find_resources("AWS::S3::BucketPolicy")
    assert {policy["Properties"]["Bucket"]["Ref"] for policy in policies.values()} == buckets.keys()
    for policy in policies.values():
        statements = policy["Properties"]["PolicyDocument"]["Statement"]
        denied = [s for s in statements if s["Effect"] == "Deny" and s["Action"] == "s3:*"]
        assert [(s["Action"], s["Principal"], s["Condition"]) for s in denied] == [
            ("s3:*", {"AWS": "*"}, {"Bool": {"aws:SecureTransport": "false"}}),
            ("s3:*", {"AWS": "*"}, {"NumericLessThan": {"s3:TlsVersion": 1.2}}),
        ]


def test_access_log_bucket_takes_logs_of_the_artifact_bucket_alone(templates):
    templates["storage"].has_resource_properties(
        "AWS::S3::Bucket",
        {
            "BucketEncryption": {
                "ServerSideEncryptionConfiguration": [{"ServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]
            }
        },
    )
    templates["storage"].has_resource_properties(
        "AWS::S3::BucketPolicy",
        {
            "PolicyDocument": {
                "Statement": Match.array_with(
                    [
                        Match.object_like(
                            {
                                "Effect": "Allow",
                                "Action": "s3:PutObject",
                                "Principal": {"Service": "logging.s3.amazonaws.com"},
                                "Condition": {
                                    "ArnLike": {"aws:SourceArn": {"Fn::GetAtt": ["Artifacts82DD59A1", "Arn"]}},
                                    "StringEquals": {"aws:SourceAccount": ACCOUNT},
                                },
                            }
                        )
                    ]
                )
            }
        },
    )


def test_key_rotates_and_serves_this_environments_logs(templates):
    key = only(templates["storage"], "AWS::KMS::Key")
    assert key["EnableKeyRotation"] is True
    (resource,) = templates["storage"].find_resources("AWS::KMS::Key").values()
    assert resource["DeletionPolicy"] == "RetainExceptOnCreate" and resource["UpdateReplacePolicy"] == "Retain"
    owner, service = key["KeyPolicy"]["Statement"]
    assert owner["Principal"] == {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}
    assert service["Principal"] == {"Service": "logs.us-east-1.amazonaws.com"}
    start = f"arn:aws:logs:us-east-1:{ACCOUNT}:log-group"
    groups = [f"{start}:shipyard-dev-*", f"{start}:/aws/sagemaker/Endpoints/shipyard-dev-*"]
    assert service["Condition"] == {"ArnLike": {"kms:EncryptionContext:aws:logs:arn": groups}}


# --- network ---------------------------------------------------------------------------------------------------------


def test_vpc_has_no_way_to_the_internet(templates):
    template = templates["network"]
    template.has_resource_properties("AWS::EC2::VPC", {"CidrBlock": "10.40.0.0/16"})
    for kind in ("InternetGateway", "NatGateway", "EgressOnlyInternetGateway", "VPNGateway", "Route", "EIP"):
        template.resource_count_is(f"AWS::EC2::{kind}", 0)
    subnets = template.find_resources("AWS::EC2::Subnet").values()
    assert [subnet["Properties"]["AvailabilityZone"] for subnet in subnets] == ["us-east-1a", "us-east-1b"]
    assert {subnet["Properties"]["MapPublicIpOnLaunch"] for subnet in subnets} == {False}


def test_endpoints_are_those_that_are_needed(templates):
    endpoints = [e["Properties"] for e in templates["network"].find_resources("AWS::EC2::VPCEndpoint").values()]
    interfaces = {e["ServiceName"]: e for e in endpoints if e["VpcEndpointType"] == "Interface"}
    services = ("ecr.api", "ecr.dkr", "logs", "kinesis-firehose", "sagemaker.runtime")
    assert interfaces.keys() == {f"com.amazonaws.us-east-1.{name}" for name in services}
    for endpoint in interfaces.values():
        assert endpoint["PrivateDnsEnabled"] is True
        assert len(endpoint["SecurityGroupIds"]) == 1
    (gateway,) = [e for e in endpoints if e["VpcEndpointType"] == "Gateway"]
    allowed = plain(gateway["PolicyDocument"]["Statement"])
    assert [(s["Action"], s["Resource"]) for s in allowed] == [
        (["s3:GetObject", "s3:ListBucket"], ["<bucket>", "<data>", "<bucket>/*", "<data>/*"]),
        (["s3:AbortMultipartUpload", "s3:PutObject"], "<data>/*"),
        ("s3:GetObject", "arn:aws:s3:::prod-us-east-1-starport-layer-bucket/*"),
    ]
    assert len(gateway["RouteTableIds"]) == 2


def test_traffic_is_logged_and_encrypted(templates):
    templates["network"].has_resource_properties(
        "AWS::EC2::FlowLog", {"TrafficType": "ALL", "LogDestinationType": "cloud-watch-logs", "ResourceType": "VPC"}
    )
    group = plain(only(templates["network"], "AWS::Logs::LogGroup"))
    assert (group["KmsKeyId"], group["RetentionInDays"]) == ("<key>", 30)


# --- gpu -------------------------------------------------------------------------------------------------------------


def test_model_is_isolated_and_named_by_its_digest(templates):
    artifact = search()
    model = only(templates["gpu"], "AWS::SageMaker::Model")
    assert model["EnableNetworkIsolation"] is True
    assert model["PrimaryContainer"] == {
        "Image": "763104351884.dkr.ecr.us-east-1.amazonaws.com/sagemaker-tritonserver:26.05-py3",
        "Environment": artifact["template"]["environment"],
        "ModelDataSource": {
            "S3DataSource": {
                "S3Uri": f"s3://{BUCKET}/artifacts/search/{artifact['digest']}/model_repository/",
                "S3DataType": "S3Prefix",
                "CompressionType": "None",
            }
        },
    }
    assert len(model["VpcConfig"]["Subnets"]) == 2 and len(model["VpcConfig"]["SecurityGroupIds"]) == 1
    assert "ModelName" not in model


def test_endpoint_config(templates):
    config = only(templates["gpu"], "AWS::SageMaker::EndpointConfig")
    assert config["ProductionVariants"] == [
        {
            "VariantName": "primary",
            "ModelName": {"Fn::GetAtt": [logical_id(templates["gpu"], "AWS::SageMaker::Model"), "ModelName"]},
            "InstanceType": "ml.g5.xlarge",
            "InitialInstanceCount": 2,
            "InitialVariantWeight": 1,
            "InferenceAmiVersion": "al2023-ami-sagemaker-inference-gpu-4-1",
        }
    ]
    assert not {"KmsKeyId", "EndpointConfigName"} & config.keys()


def test_endpoint_keeps_what_was_scaled(templates):
    endpoint = only(templates["gpu"], "AWS::SageMaker::Endpoint")
    config = logical_id(templates["gpu"], "AWS::SageMaker::EndpointConfig")
    assert endpoint["EndpointConfigName"] == {"Fn::GetAtt": [config, "EndpointConfigName"]}
    assert endpoint["RetainAllVariantProperties"] is True


def test_endpoint_role_reads_its_artifact_and_image_alone(templates):
    role = only(templates["gpu"], "AWS::IAM::Role")
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert trust["Condition"] == {"StringEquals": {"aws:SourceAccount": ACCOUNT}}
    allowed = statements(role)
    assert allowed["s3:GetObject"] == (["<bucket>/artifacts/search/*/*"], None)
    assert allowed["s3:ListBucket"] == (["<bucket>"], {"StringLike": {"s3:prefix": "artifacts/search/*/*"}})
    through_s3 = {"StringEquals": {"kms:ViaService": "s3.us-east-1.amazonaws.com"}}
    assert allowed["kms:Decrypt"] == (["<key>"], through_s3)
    pull = "ecr:BatchCheckLayerAvailability ecr:BatchGetImage ecr:GetDownloadUrlForLayer"
    assert allowed[pull] == (["arn:aws:ecr:us-east-1:763104351884:repository/sagemaker-tritonserver"], None)


def test_endpoint_group_reaches_s3_alone(templates):
    templates["gpu"].resource_count_is("AWS::EC2::SecurityGroupIngress", 0)
    rule = only(templates["gpu"], "AWS::EC2::SecurityGroupEgress")
    assert (rule["DestinationPrefixListId"], rule["ToPort"]) == ("pl-63a5400a", 443)


# --- cpu -------------------------------------------------------------------------------------------------------------


def test_task_fetches_then_serves(templates, key, signer):
    bundle = recommend()
    task = only(templates["cpu"], "AWS::ECS::TaskDefinition")
    assert (task["Cpu"], task["Memory"], task["NetworkMode"]) == ("1024", "2048", "awsvpc")
    assert task["RuntimePlatform"] == {"CpuArchitecture": "ARM64", "OperatingSystemFamily": "LINUX"}
    assert task["Volumes"] == [{"Name": "model"}]
    fetch, serve = task["ContainerDefinitions"]
    assert (fetch["Name"], fetch["Essential"]) == ("fetch", False)
    assert fetch["Command"] == [
        *("-m", "serve.fetch", f"s3://{BUCKET}/artifacts/recommend/{bundle['digest']}/"),
        *("--attestation", attest("recommend", bundle["manifest"], key), "--into", "/model"),
    ]
    assert (serve["Name"], serve["Essential"]) == ("serve", True)
    assert serve["Command"] == ["-m", "serve.server", "--bundle", "/model"]
    assert serve["DependsOn"] == [{"ContainerName": "fetch", "Condition": "SUCCESS"}]
    assert serve["PortMappings"] == [{"ContainerPort": 8080, "Protocol": "tcp"}]
    for container, read_only in ((fetch, False), (serve, True)):
        assert container["MountPoints"] == [{"ContainerPath": "/model", "SourceVolume": "model", "ReadOnly": read_only}]
        registry = ["", [f"{ACCOUNT}.dkr.ecr.us-east-1.", {"Ref": "AWS::URLSuffix"}, f"/{IMAGE}"]]
        assert container["Image"] == {"Fn::Join": registry}
        assert container["User"] == "10001"
        assert container["Privileged"] is False
        assert container["ReadonlyRootFilesystem"] is True
        assert container["LinuxParameters"] == {"InitProcessEnabled": True, "Capabilities": {"Drop": ["ALL"]}}
        assert container["Environment"] == [
            {"Name": "ORT_DISABLE_TELEMETRY", "Value": "1"},
            {"Name": "SHIPYARD_TRUSTED_KEY", "Value": signer},
        ]
        assert container["LogConfiguration"]["LogDriver"] == "awslogs"


def test_task_role_reads_its_artifact_alone(templates):
    (role,) = [
        role["Properties"]
        for name, role in templates["cpu"].find_resources("AWS::IAM::Role").items()
        if name.startswith("recommendRole")
    ]
    through_s3 = {"StringEquals": {"kms:ViaService": "s3.us-east-1.amazonaws.com"}}
    assert statements(role) == {
        "s3:GetObject": (["<bucket>/artifacts/recommend/*/*"], None),
        "kms:Decrypt": (["<key>"], through_s3),
    }


def test_execution_role_pulls_one_repository(templates):
    policy = only(templates["cpu"], "AWS::IAM::Policy")
    pull = policy["PolicyDocument"]["Statement"][0]
    assert pull["Action"] == ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    assert pull["Resource"] == f"arn:aws:ecr:us-east-1:{ACCOUNT}:repository/shipyard/recommend"


def test_service_rolls_back_and_is_private(templates):
    service = only(templates["cpu"], "AWS::ECS::Service")
    assert service["LaunchType"] == "FARGATE"
    assert "DesiredCount" not in service
    assert service["DeploymentConfiguration"] == {
        "Alarms": {
            "AlarmNames": [{"Ref": name} for name in templates["cpu"].find_resources("AWS::CloudWatch::Alarm")],
            "Enable": True,
            "Rollback": True,
        },
        "BakeTimeInMinutes": 10,
        "CanaryConfiguration": {"CanaryBakeTimeInMinutes": 5, "CanaryPercent": 10},
        "Strategy": "CANARY",
        "DeploymentCircuitBreaker": {"Enable": True, "Rollback": True},
        "MinimumHealthyPercent": 100,
        "MaximumPercent": 200,
    }
    place = service["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert place["AssignPublicIp"] == "DISABLED"
    assert len(place["Subnets"]) == 2
    balancer = only(templates["cpu"], "AWS::ElasticLoadBalancingV2::LoadBalancer")
    assert (balancer["Scheme"], balancer["Type"]) == ("internal", "application")
    for group in templates["cpu"].find_resources("AWS::ElasticLoadBalancingV2::TargetGroup").values():
        targets = group["Properties"]
        assert (targets["HealthCheckPath"], targets["Port"], targets["TargetType"]) == ("/readyz", 8080, "ip")


def test_service_scales_from_its_tasks_to_four_times_as_many(templates):
    target = only(templates["cpu"], "AWS::ApplicationAutoScaling::ScalableTarget")
    assert (target["MinCapacity"], target["MaxCapacity"]) == (3, 12)
    policy = only(templates["cpu"], "AWS::ApplicationAutoScaling::ScalingPolicy")
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["PredefinedMetricSpecification"] == {"PredefinedMetricType": "ECSServiceAverageCPUUtilization"}


def test_only_clients_reach_the_load_balancer_and_only_it_the_tasks(templates):
    def group(value):
        return value["Fn::GetAtt"][0] if "Fn::GetAtt" in value else re.search(r"(Clients|Endpoints)", str(value))[0]

    ingress = [r["Properties"] for r in templates["cpu"].find_resources("AWS::EC2::SecurityGroupIngress").values()]
    tasks, balancer = "recommendSecurityGroup0D746A0F", "LoadBalancerSecurityGroup3036A0FC"
    assert {(group(r["SourceSecurityGroupId"]), group(r["GroupId"]), r["ToPort"]) for r in ingress} == {
        ("Clients", balancer, 80),
        ("Clients", balancer, 8080),
        (balancer, tasks, 8080),
        (tasks, "Endpoints", 443),
    }


def test_cluster_is_watched_and_logs_are_encrypted(templates):
    cluster = only(templates["cpu"], "AWS::ECS::Cluster")
    assert cluster["ClusterSettings"] == [{"Name": "containerInsights", "Value": "enabled"}]
    group = plain(only(templates["cpu"], "AWS::Logs::LogGroup"))
    assert (group["KmsKeyId"], group["RetentionInDays"]) == ("<key>", 30)


# --- edge ------------------------------------------------------------------------------------------------------------


def test_components_are_kept_and_their_recipes_are_static(templates):
    versions = templates["edge"].find_resources("AWS::GreengrassV2::ComponentVersion")
    assert versions.keys() == {"edgeruntime", "edgemodel"}
    for version in versions.values():
        assert version["DeletionPolicy"] == "RetainExceptOnCreate"
        assert version["UpdateReplacePolicy"] == "Retain"
        assert isinstance(version["Properties"]["InlineRecipe"], str)
    document = json.loads(versions["edgemodel"]["Properties"]["InlineRecipe"])
    assert document == fill(recipe("com.example.model", "artifacts/edge-model/part.zip"), {"BUCKET": BUCKET}, "")


def test_deployment_pins_every_component(templates, key, signer):
    attestation = attest("edge-model", edge("model")["manifest"], key)
    configuration = {"models": f"com.example.model/0.1.0/edge-model/{attestation}", "trustedKey": signer}
    deployments = templates["edge"].find_resources("AWS::GreengrassV2::Deployment")
    canary, deployment = (deployments[name]["Properties"] for name in ("CanaryDeployment", "Deployment"))
    assert canary["TargetArn"] == {"Fn::GetAtt": ["CanaryGroup", "Arn"]}
    assert deployment["TargetArn"] == {"Fn::GetAtt": ["ThingGroup", "Arn"]}
    assert deployments["Deployment"]["DependsOn"] == ["CanaryDeployment"]
    assert {**canary, "TargetArn": 0} == {**deployment, "TargetArn": 0}
    jobs = deployment["IotJobConfiguration"]
    assert jobs["AbortConfig"]["CriteriaList"] == [
        {"Action": "CANCEL", "FailureType": "FAILED", "MinNumberOfExecutedThings": 5, "ThresholdPercentage": 10}
    ]
    assert jobs["JobExecutionsRolloutConfig"]["ExponentialRate"]["BaseRatePerMinute"] == 50
    assert jobs["TimeoutConfig"] == {"InProgressTimeoutInMinutes": 60}
    assert deployment["Components"] == {
        "aws.greengrass.Nucleus": {
            "ComponentVersion": "2.16.0",
            "ConfigurationUpdate": {"Merge": '{"interpolateComponentConfiguration": true}'},
        },
        "aws.greengrass.TokenExchangeService": {"ComponentVersion": "2.0.3"},
        "com.example.runtime": {
            "ComponentVersion": {"Fn::GetAtt": ["edgeruntime", "ComponentVersion"]},
            "ConfigurationUpdate": {"Merge": json.dumps(configuration)},
        },
        "com.example.model": {"ComponentVersion": {"Fn::GetAtt": ["edgemodel", "ComponentVersion"]}},
    }
    groups = templates["edge"].find_resources("AWS::IoT::ThingGroup")
    assert {g["Properties"]["ThingGroupName"] for g in groups.values()} == {"shipyard-dev", "shipyard-dev-canary"}


def test_published_components_are_pinned_and_not_made(build):
    made = read(build(components="published"))["edge"]
    assert made.find_resources("AWS::GreengrassV2::ComponentVersion") == {}
    for deployment in made.find_resources("AWS::GreengrassV2::Deployment").values():
        assert deployment["Properties"]["Components"]["com.example.model"] == {"ComponentVersion": "0.1.0"}


def test_devices_read_components_alone(templates):
    role = only(templates["edge"], "AWS::IAM::Role")
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "credentials.iot.amazonaws.com"}
    allowed = statements(role)
    keys = ("artifacts/edge-model/*/*", "artifacts/edge-runtime/*/*", "deltas/edge-model/*")
    assert allowed["s3:GetObject"] == ([f"<bucket>/{key}" for key in keys], None)
    assert allowed.keys() == {"s3:GetObject", "s3:GetBucketLocation", "kms:Decrypt"}


def test_devices_use_topics_of_their_own_group(templates):
    document = only(templates["edge"], "AWS::IoT::Policy")["PolicyDocument"]
    allowed = {str(statement["Action"]): statement["Resource"] for statement in document["Statement"]}
    arn = f"arn:aws:iot:us-east-1:{ACCOUNT}"
    things = "$aws/things/shipyard-dev-*"
    assert allowed["iot:Connect"] == f"{arn}:client/shipyard-dev-*"
    assert allowed["['iot:Publish', 'iot:Receive']"] == [
        f"{arn}:topic/{things}/jobs/*",
        f"{arn}:topic/{things}/shadow/*",
        f"{arn}:topic/{things}/greengrass/health/json",
        f"{arn}:topic/{things}/greengrassv2/health/json",
    ]
    assert allowed["iot:Subscribe"] == [f"{arn}:topicfilter/{things}/jobs/*", f"{arn}:topicfilter/{things}/shadow/*"]
    assert allowed["iot:AssumeRoleWithCertificate"] == {"Fn::GetAtt": ["RoleAlias", "RoleAliasArn"]}
    assert "iot:Connection.Thing" not in json.dumps(document)  # core devices know no such variables


# --- a release follows another ---------------------------------------------------------------------------------------


def changed(before, after):
    """Return the logical ids whose resources differ, by stack."""
    differing = {}
    for name in STACKS:
        one, other = before[name]["Resources"], after[name].to_json()["Resources"]
        differing[name] = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    return differing


def test_new_search_artifact_replaces_model_and_config(build, bodies):
    after = read(build(search("2"), recommend(), edge("runtime"), edge("model"), gateway()))
    # the configuration refers to the model and the endpoint to the configuration, so CloudFormation follows the chain
    assert changed(bodies, after) == {
        "storage": set(),
        "network": set(),
        "gpu": {logical_id(after["gpu"], "AWS::SageMaker::Model")},
        "cpu": set(),
        "edge": set(),
        "gateway": set(),
    }


def test_new_recommend_artifact_changes_the_task_definition_alone(build, bodies):
    after = read(build(search(), recommend("2"), edge("runtime"), edge("model"), gateway()))
    assert changed(bodies, after) == {
        "storage": set(),
        "network": set(),
        "gpu": set(),
        "cpu": {logical_id(after["cpu"], "AWS::ECS::TaskDefinition")},
        "edge": set(),
        "gateway": set(),
    }


def test_new_component_changes_its_version_alone(build, bodies):
    after = read(build(search(), recommend(), edge("runtime"), edge("model", ComponentVersion="0.2.0"), gateway()))
    assert changed(bodies, after)["edge"] == {"edgemodel"}


# --- what is refused -------------------------------------------------------------------------------------------------


def test_placeholder_without_value_is_an_error(build):
    with pytest.raises(ShipyardError, match=r"template of artifact edge-model: unknown placeholder.*@BUKET@"):
        build(edge("model", ComponentDescription="@BUKET@"))


def test_fill_reaches_keys_lists_and_depth():
    values = {"REGION": "r", "ACCOUNT": "a"}
    template = {"@REGION@": ["x", {"k": "arn:@REGION@:@ACCOUNT@"}], "n": 1, "b": True, "none": None}
    filled = {"r": ["x", {"k": "arn:r:a"}], "n": 1, "b": True, "none": None}
    assert fill(template, values, "sample") == filled


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ComponentName": 1}, "a recipe with ComponentName"),
        ({"ComponentDescription": "x" * 8000}, "recipe of edge-model is too large"),
    ],
)
def test_recipe_that_no_device_takes_is_an_error(build, change, message):
    with pytest.raises(ShipyardError, match=message):
        build(edge("model", **change))


def test_unknown_field_of_a_template_is_an_error(build):
    artifact = search()
    artifact["template"]["enviroment"] = {}
    with pytest.raises(ShipyardError, match=r'enviroment: unknown key.*did you mean "environment"'):
        build(artifact)


def test_unknown_region_is_an_error(build, monkeypatch):
    with pytest.raises(ShipyardError, match="region without a known S3 prefix list; value: 'cn-north-1'"):
        build(region="cn-north-1")
    monkeypatch.setitem(network.S3_PREFIX_LISTS, "cn-north-1", "pl-1")
    with pytest.raises(ShipyardError, match="no Triton image in this region; value: 'cn-north-1'"):
        build(region="cn-north-1")


def test_every_region_of_the_network_has_a_triton_image():
    assert network.S3_PREFIX_LISTS.keys() <= hosting.TRITON_ACCOUNTS.keys()


def synthesize(path, **context):
    app.build(cdk.App(context={**CONTEXT, "release": str(path), **context}), ROOT)


def test_release_that_was_changed_is_refused(tmp_path):
    path = write_release(tmp_path / "release")
    path.write_text(path.read_text().replace("model_repository/", "another_repository/"))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        synthesize(path)


def test_release_of_another_signer_is_refused(tmp_path):
    path = write_release(tmp_path / "release")
    write_release(tmp_path / "other")
    with pytest.raises(ShipyardError, match="signed by a key that is not trusted"):
        synthesize(path, keys=str(tmp_path / "other" / "keys"))


def test_release_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ShipyardError, match="no such release"):
        synthesize(tmp_path / "0.1.0-g000000000000.json")


def test_environment_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ShipyardError, match="-c env: no such environment; value: 'nope'"):
        synthesize(write_release(tmp_path / "release"), env="nope")
