"""Create or update a Hugging Face Inference Endpoint for this code, wait until it runs, and send the test requests.

    python deploy.py --name pulse --repository USER/REPO --dry-run

The token is the one that huggingface_hub finds: ``HF_TOKEN``, or that of ``hf auth login``.  deployment_guide.md walks
through the ways to deploy.  Flags that are left out keep what an existing endpoint has.  Exits with 0 when all went
well, 1 when something failed, 2 for flags that cannot be used.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, InferenceEndpoint, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from scripts.endpoint_settings import (
    PORT,
    STOCK_IMAGE,
    DeployError,
    Settings,
    check_credentials,
    check_fixed,
    remarks,
    settings_of,
    wanted,
)
from scripts.send_test_requests import Sample, load_cases, run, sample_of, wait_until_up

Say = Callable[[str], None]
POLL_S = 5.0
FAILED = ("failed", "updateFailed")
ENDED = (*FAILED, "running", "scaledToZero")
SECRET_NAME = re.compile(r"deep_key|.*(_KEY|TOKEN|SECRET|PASSWORD)", re.IGNORECASE)
# huggingface_hub 0.30 cannot send variables, nor put an endpoint back on the stock container.
SENDS_ENV = "env" in inspect.signature(HfApi.update_inference_endpoint).parameters
_CLIENT = sys.modules[type(get_session()).__module__.partition(".")[0]]  # requests, or httpx in later versions
ConnectionLostError: type[Exception] = getattr(_CLIENT, "RequestError", None) or _CLIENT.RequestException


@dataclass(frozen=True)
class Target:
    """An endpoint by name, with the account that owns it."""

    api: HfApi
    name: str
    namespace: str

    @property
    def page(self) -> str:
        """Where its log can be read."""
        return f"https://endpoints.huggingface.co/{self.namespace}/endpoints/{self.name}"

    def find(self) -> InferenceEndpoint | None:
        """The endpoint, if there is one."""
        try:
            return self.api.get_inference_endpoint(self.name, namespace=self.namespace)
        except HfHubHTTPError as error:
            if _status(error) == 404:
                return None
            raise


# --- flags


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with 2 where they contradict each other or a value is missing."""
    parser = argparse.ArgumentParser(description="Create or update an Inference Endpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("--name", required=True, help="the endpoint's name")
    add("--repository", required=True, metavar="USER/REPO", help="model repository, mounted at /repository")
    add("--revision", help="commit, tag or branch of the repository; pinned to its commit (default: main)")
    add("--namespace", help="user or organisation that owns the endpoint (default: the token's user)")
    add("--container", choices=("stock", "custom"), help="default: stock, or what the endpoint has")
    add("--image", help="the custom container's image, with a tag or digest")
    add("--port", type=int, help=f"port of the custom container (default: {PORT}, or what the endpoint has)")
    add("--vendor", help="default: aws")
    add("--region", help="default: us-east-1")
    add("--instance-type", help="default: nvidia-l4")
    add("--instance-size", help="default: x1")
    add("--min-replica", type=int, help="default: 0")
    add("--max-replica", type=int, help="default: 1")
    add("--scale-to-zero-minutes", type=int, help="minutes without a request; needs --min-replica 0 (default: 15)")
    add("--access", choices=("private", "authenticated", "public"), help="default: private, your account alone")
    add("--secret", action="append", default=[], metavar="NAME", help="takes its value from the variable NAME")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable that is no secret")
    add("--timeout", type=float, default=1800, help="seconds to wait until it runs (default: 1800)")
    add("--test-image", type=Path, help="image for the test requests (default: the demo's sample ECG)")
    add("--dry-run", action="store_true", help="say what would change, and change nothing")
    add("--no-wait", action="store_true", help="return as soon as the change was accepted; implies --skip-test")
    add("--skip-test", action="store_true", help="do not send test_requests.json")
    args = parser.parse_args(argv)
    if (args.container == "custom") != bool(args.image):
        parser.error("--container custom and --image go together")
    for secret in args.secret:
        name, equals, _ = secret.partition("=")
        if equals:
            parser.error(f"--secret {name} takes no value: set the environment variable {name}")
        if not os.environ.get(name):
            parser.error(f"--secret {name}: the environment variable {name} is not set")
    args.env = dict(_variable(parser, text) for text in args.env)
    return args


def _variable(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or not equals:
        parser.error(f"--env {name}: NAME=VALUE is expected")
    if SECRET_NAME.fullmatch(name):
        parser.error(f"--env {name} would be shown to whoever sees the endpoint: use --secret {name}")
    return name, value


# --- what is there


def check_client(changes: Settings, *, update: bool) -> None:
    """Refuse what this version of huggingface_hub cannot send."""
    back_to_stock = update and changes.get("image") == STOCK_IMAGE
    if not SENDS_ENV and (changes.get("env") or back_to_stock):
        what = "put an endpoint back on the stock container" if back_to_stock else "send variables (--env)"
        raise DeployError(
            f"huggingface_hub {huggingface_hub.__version__} cannot {what}: pip install --upgrade huggingface_hub"
        )


def read_repository(api: HfApi, args: argparse.Namespace, say: Say) -> tuple[str, set[str]]:
    """The commit to deploy, and its files."""
    revision = args.revision or "main"
    try:
        info = api.model_info(args.repository, revision=revision)
    except RevisionNotFoundError as error:
        raise DeployError(f"{args.repository} has no revision {revision}: give --revision a full commit.") from error
    except RepositoryNotFoundError as error:
        raise DeployError(
            f"{args.repository} cannot be read with this token: check its name, and that the token may read it."
        ) from error
    if not info.sha:
        raise DeployError(f"The hub gives no commit for {args.repository} at {revision}: try again.")
    say(f"{args.repository} at {revision} is commit {info.sha}")
    return info.sha, {file.rfilename for file in info.siblings or ()}


# --- doing it


def show(say: Say, target: Target, settings: Settings, existing: Settings | None, secrets: Sequence[str]) -> Settings:
    """Say what changes; the changes."""
    changes = {name: value for name, value in settings.items() if not existing or existing[name] != value}
    title = "nothing to change" if not changes and not secrets else "to be updated" if existing else "to be created"
    say(f"Endpoint {target.name} of {target.namespace}: {title}")
    for name, value in changes.items():
        say(f"  {name:22}{existing[name]} -> {value}" if existing else f"  {name:22}{value}")
    if secrets:
        say(f"  {'secrets':22}{', '.join(secrets)} (values not shown)")
    return changes


def apply(target: Target, args: argparse.Namespace, changes: Settings, endpoint: InferenceEndpoint | None) -> None:
    """Create the endpoint, or change what is to be changed; wake it if it is paused."""
    secrets = {name: os.environ[name] for name in args.secret}
    arguments: dict[str, Any] = {name: value for name, value in changes.items() if name != "image" and value != {}}
    image = changes.get("image", {})
    if "custom" in image:
        arguments["custom_image"] = image["custom"]
    if endpoint is None:
        arguments |= {"vendor": args.vendor or "aws", "region": args.region or "us-east-1"}
        arguments |= {"type": args.access or "private"}
        target.api.create_inference_endpoint(
            target.name, namespace=target.namespace, secrets=secrets or None, **arguments
        )
        return
    if "huggingface" in image:
        arguments["custom_image"] = image
    if arguments or secrets:
        target.api.update_inference_endpoint(
            target.name, namespace=target.namespace, secrets=secrets or None, **arguments
        )
    if endpoint.status == "paused":
        target.api.resume_inference_endpoint(target.name, namespace=target.namespace)


def wait(target: Target, *, timeout_s: float, looks: int, say: Say) -> InferenceEndpoint:
    """Wait until the endpoint runs, or is asleep and wakes when it is called; a line for each look at it.

    Args:
        looks: how often in a row the end must be seen: right after an update the state may still be that before it.
    """
    started, seen = time.monotonic(), 0
    while True:
        endpoint, text = None, "not known"
        try:
            endpoint = target.find()
        except HfHubHTTPError as error:
            if (_status(error) or 0) < 500 and _status(error) != 429:
                raise
            text = f"not known (HTTP {_status(error)})"
        except ConnectionLostError as error:
            text = f"not known ({type(error).__name__})"
        elapsed = time.monotonic() - started
        message = endpoint.raw["status"].get("message") or "" if endpoint else ""
        say(f"{elapsed:5.0f} s  {getattr(endpoint, 'status', text)!s:14}{message}".rstrip())
        seen = seen + 1 if endpoint and endpoint.status in ENDED else 0
        if endpoint and seen >= looks:
            if endpoint.status in FAILED:
                raise DeployError(f"The deployment failed: {message or 'no reason given'}\nThe log: {target.page}")
            return endpoint
        if elapsed > timeout_s:
            raise DeployError(f"Not running after {timeout_s:.0f} s; it goes on without this script: {target.page}")
        time.sleep(POLL_S)


def test(endpoint: InferenceEndpoint, sample: Sample, *, timeout_s: float, say: Say) -> None:
    """Send ``test_requests.json``; a line for each request."""
    if not endpoint.url:
        raise DeployError("The endpoint has no URL that can be reached from here: use --skip-test.")
    token = None if endpoint.type == "public" else get_token()
    wait_until_up(endpoint.url, token=token, seconds=timeout_s)
    outcome = run(load_cases(), sample, url=endpoint.url, token=token, timeout_s=300.0)
    failed = [name for name, found in outcome.items() if found]
    say(f"{len(outcome) - len(failed)} of {len(outcome)} test requests passed or were skipped")
    if failed:
        raise DeployError(f"Test requests failed: {', '.join(failed)}.")


def deploy(args: argparse.Namespace, say: Say) -> None:
    """All of it, in order: look, show, change, wait, test.

    Raises:
        DeployError: it cannot be done, or did not work.
        HfHubHTTPError: the service refused.
    """
    if not get_token():
        raise DeployError("There is no token: set HF_TOKEN, or run `hf auth login`.")
    sample = None if args.dry_run or args.no_wait or args.skip_test else _sample(args.test_image)
    api = HfApi()
    target = Target(api, args.name, args.namespace or api.whoami()["name"])
    commit, files = read_repository(api, args, say)
    endpoint = target.find()
    existing = settings_of(endpoint.raw) if endpoint else None
    if endpoint:
        check_fixed(args, endpoint.raw)
    settings = wanted(args, commit, existing)
    if endpoint:
        check_credentials(settings, endpoint.raw)
    secrets_there = list(endpoint.raw["model"].get("secrets") or ()) if endpoint else []
    for remark in remarks(settings, files, secrets_there, args.secret):
        say(f"Warning: {remark}")
    changes = show(say, target, settings, existing, args.secret)
    if endpoint and endpoint.status == "paused":
        say("It is paused, and will be resumed.")
    check_client(changes, update=endpoint is not None)
    if args.dry_run:
        say("Dry run: nothing was changed.")
        return
    apply(target, args, changes, endpoint)
    if args.no_wait:
        say(f"Accepted; its progress: {target.page}")
        return
    try:
        running = wait(target, timeout_s=args.timeout, looks=3 if endpoint else 1, say=say)
        say(f"{running.url} serves {settings['repository']} at {settings['revision']}")
        if sample:
            test(running, sample, timeout_s=args.timeout, say=say)
    except DeployError as error:
        if existing and existing["revision"] and "revision" in changes:
            raise DeployError(f"{error}\nTo go back, add --revision {existing['revision']}") from error
        raise


def _sample(image: Path | None) -> Sample:
    try:
        return sample_of(image, None)
    except ImportError as error:
        raise DeployError(f"{error.name} is not installed, so no sample can be drawn: give --test-image.") from error
    except OSError as error:
        raise DeployError(f"--test-image cannot be read: {error.strerror}.") from error


def _status(error: HfHubHTTPError) -> int | None:
    return None if error.response is None else int(error.response.status_code)


def _explained(error: HfHubHTTPError) -> str:
    advice = {
        400: "correct the flag that it names",
        401: "the token is wrong or expired: set HF_TOKEN anew, or run `hf auth login`",
        402: "the account needs a payment method",
        403: "give the token the right to manage Inference Endpoints, and the account a payment method",
        404: "check --namespace",
        409: "an endpoint of that name is being changed or deleted: try again in a minute",
        429: "too many requests: try again in a minute",
    }
    status = _status(error)
    return f"HTTP {status}: {error.server_message or error}\nNext: {advice.get(status or 0, 'try again later')}."


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    hidden = [value for value in (*(os.environ[name] for name in args.secret), get_token()) if value]

    def say(text: str) -> None:
        for value in hidden:
            text = text.replace(value, "***")
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    try:
        deploy(args, say)
    except DeployError as error:
        say(f"Error: {error}")
    except HfHubHTTPError as error:
        say(f"Error: {_explained(error)}")
    except ConnectionLostError as error:
        say(f"Error: no connection ({type(error).__name__}).\nNext: check the network, then run it again.")
    except KeyboardInterrupt:
        say("Stopped; what the service has accepted goes on.")
        return 130
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
