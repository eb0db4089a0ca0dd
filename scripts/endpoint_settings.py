"""What an Inference Endpoint is to be, from flags and from what it is: the part of ``deploy.py`` that asks nobody."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

# The keyword arguments of huggingface_hub's `update_inference_endpoint`, with `image` for `custom_image`.
Settings = dict[str, Any]

STOCK_IMAGE: dict[str, Any] = {"huggingface": {}}
FOR_A_NEW_ENDPOINT: Settings = {
    "instance_type": "nvidia-l4",
    "instance_size": "x1",
    "min_replica": 0,
    "max_replica": 1,
    "scale_to_zero_timeout": 15,
    "image": STOCK_IMAGE,
    "env": {},
}
STOCK_FILES = ("handler.py", "utils.py", "requirements.txt")
GPU_GB = {"t4": 16, "l4": 24, "a10g": 24, "l40s": 48, "a100": 80, "h100": 80, "h200": 141, "b200": 180}
NEEDED_GB, NEEDED_GB_QUANTIZED = 24, 16
HEALTH_ROUTE, PORT = "/health", 8080


class DeployError(Exception):
    """What went wrong, and what to do next."""


def settings_of(raw: dict[str, Any]) -> Settings:
    """An existing endpoint's settings, from what the service says of it."""
    compute, model = raw["compute"], raw["model"]
    return {
        "accelerator": compute["accelerator"],
        "instance_type": compute["instanceType"],
        "instance_size": compute["instanceSize"],
        "min_replica": compute["scaling"]["minReplica"],
        "max_replica": compute["scaling"]["maxReplica"],
        "scale_to_zero_timeout": compute["scaling"].get("scaleToZeroTimeout"),
        "repository": model["repository"],
        "revision": model.get("revision"),
        "framework": model.get("framework"),
        "task": model.get("task"),
        "image": _image_of(model.get("image") or STOCK_IMAGE),
        "env": model.get("env") or {},
    }


def _image_of(raw: dict[str, Any]) -> dict[str, Any]:
    """A container, without what the service adds; one of a third kind as it is."""
    if custom := raw.get("custom"):
        return {"custom": {key: custom.get(key) for key in ("url", "port", "healthRoute")}}
    return STOCK_IMAGE if "huggingface" in raw else raw


def wanted(args: argparse.Namespace, commit: str, existing: Settings | None) -> Settings:
    """What the flags ask for; what they leave open stays as it is, or is as for a new endpoint.

    Raises:
        DeployError: the result cannot work.
    """
    base = existing or FOR_A_NEW_ENDPOINT
    image = _image(args, base["image"])
    given = {
        "repository": args.repository,
        "revision": commit,
        "framework": "custom",
        "task": "custom",  # another task would make the stock container take strings for base64 images
        "instance_type": args.instance_type,
        "instance_size": args.instance_size,
        "min_replica": args.min_replica,
        "max_replica": args.max_replica,
        "scale_to_zero_timeout": args.scale_to_zero_minutes,
        "image": image,
        "env": _env(args, base, image),
    }
    settings = base | {name: value for name, value in given.items() if value is not None}
    if settings["image"].keys().isdisjoint(("custom", "huggingface")):
        raise DeployError(f"The endpoint runs another container ({', '.join(settings['image'])}): give --container.")
    if args.port and "custom" not in settings["image"]:
        raise DeployError("--port is the custom container's: give --container custom and --image.")
    settings["accelerator"] = "gpu" if settings["instance_type"].startswith("nvidia") else "cpu"
    least, most = settings["min_replica"], settings["max_replica"]
    if not 0 <= least <= most or most < 1:
        raise DeployError(f"{least} to {most} replicas cannot be: give --min-replica and --max-replica that can.")
    if least > 0 and args.scale_to_zero_minutes is not None:
        raise DeployError("--scale-to-zero-minutes needs --min-replica 0.")
    if least > 0 and existing is None:
        settings["scale_to_zero_timeout"] = None
    if settings["scale_to_zero_timeout"] is not None and settings["scale_to_zero_timeout"] < 1:
        raise DeployError("--scale-to-zero-minutes must be at least 1.")
    return settings


def _image(args: argparse.Namespace, existing: dict[str, Any]) -> dict[str, Any] | None:
    if args.container == "stock":
        return STOCK_IMAGE
    there = existing.get("custom", {})
    if args.container is None and not (args.port and there):
        return None
    port = args.port or there.get("port") or PORT
    return {"custom": {"url": args.image or there["url"], "port": port, "healthRoute": HEALTH_ROUTE}}


def _env(args: argparse.Namespace, base: Settings, image: dict[str, Any] | None) -> dict[str, str]:
    """The variables; the server listens where the service asks, unless ``--env`` says otherwise."""
    env: dict[str, str] = base["env"] | args.env
    custom = (image or {}).get("custom")
    if custom is None or "PULSE_PORT" in args.env or (custom["port"] == PORT and "PULSE_PORT" not in env):
        return env
    return env | {"PULSE_PORT": str(custom["port"])}


def check_fixed(args: argparse.Namespace, raw: dict[str, Any]) -> None:
    """Refuse what the service cannot change of an existing endpoint."""
    provider = raw.get("provider") or {}
    for flag, given, has in (
        ("--vendor", args.vendor, provider.get("vendor")),
        ("--region", args.region, provider.get("region")),
        ("--access", args.access, raw.get("type")),
    ):
        if given and has and given != has:
            raise DeployError(
                f"{flag} is {has}, and cannot be changed: use another --name, or delete the endpoint first."
            )


def check_credentials(settings: Settings, raw: dict[str, Any]) -> None:
    """Refuse to change an image that the service pulls with credentials: they come with it, and are not shown."""
    before = raw["model"].get("image") or {}
    if (before.get("custom") or {}).get("credentials") and settings["image"] not in (_image_of(before), STOCK_IMAGE):
        raise DeployError("The image's registry credentials would be lost: change the image on the endpoint's page.")


def remarks(settings: Settings, files: set[str], existing_secrets: Sequence[str], secrets: Sequence[str]) -> list[str]:
    """What may be meant, but mostly is not.

    Raises:
        DeployError: the stock container would find no handler.
    """
    custom = settings["image"].get("custom")
    if not custom and (missing := [name for name in STOCK_FILES if name not in files]):
        raise DeployError(
            f"The repository has no {', '.join(missing)}: upload this code first, or use --container custom --image."
        )
    found = []
    if custom and "@" not in (url := custom["url"]) and (":" not in url.rpartition("/")[2] or url.endswith(":latest")):
        found.append("the image has no version: it may change under the endpoint; give a tag or a digest")
    quantized = settings["env"].get("PULSE_QUANTIZATION", "none") != "none"
    needed = NEEDED_GB_QUANTIZED if quantized else NEEDED_GB
    gigabytes = GPU_GB.get(settings["instance_type"].removeprefix("nvidia-"))
    if settings["accelerator"] == "cpu":
        found.append("no GPU: an answer takes minutes, and the weights twice the memory")
    elif gigabytes is None or gigabytes < needed:
        size = "an unknown amount" if gigabytes is None else f"{gigabytes} GB"
        found.append(f"{settings['instance_type']} has {size} of GPU memory; the model needs {needed} GB")
    if (
        settings["accelerator"] == "gpu"
        and settings["instance_size"] != "x1"
        and "PULSE_VLLM_ARGS" not in settings["env"]
    ):
        found.append(
            f"a replica uses one GPU unless its image runs vLLM and --env PULSE_VLLM_ARGS names more; "
            f"{settings['instance_size']} is paid for all the same"
        )
    weights = any(name.endswith(".safetensors") and "/" not in name for name in files)
    if not weights and "PULSE_MODEL_REVISION" not in settings["env"]:
        found.append("no weights in the repository: pin those of the hub with --env PULSE_MODEL_REVISION=COMMIT")
    if secrets and (others := sorted(set(existing_secrets) - set(secrets))):
        found.append(f"secrets that are not given again may be lost: {', '.join(others)}")
    return found
