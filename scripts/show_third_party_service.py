"""The commentary client, unchanged, against a server that is not ours: ``transformers serve``, on this machine.

    .venv/bin/python scripts/show_third_party_service.py        (or: make third-party)

It installs the server into ``.venv-serving``, trains a tiny Llama for a minute, serves it on a free loopback port, and
runs ``check_commentary_service.py`` against it.  Nothing leaves the machine but pip's downloads.

The model is no translator: it is overfitted to one prompt, the client's own for one fixed English answer, and knows
one faithful Turkish commentary by heart.  A random model would answer gibberish, which the faithfulness check rightly
refuses.  What is shown is the protocol: request, fields, answer, the model's name and the token count, which are
compared with what the server tells a plain HTTP client that asks the same.

Exit status: 0 shown, 1 the outcome is not the expected one or the server did not start.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commentary.prompt import messages

ROOT = Path(__file__).resolve().parents[1]
SERVING = ROOT / ".venv-serving"
FOLDER = ROOT / "build" / "third-party"
MODEL = "tiny-commentary"
ENGLISH = "Sinus bradycardia at 48 bpm with first-degree AV block (PR 220 ms). No ST elevation."
TURKISH = (
    "Kalbiniz dakikada 48 atımla olağandan yavaş çalışıyor; buna sinüs bradikardisi denir. "
    "Uyarının kulakçıktan karıncığa geçişi gecikiyor: birinci derece AV blok (PR 220 ms). ST yükselmesi yok. "
    "Göğüs ağrısı, nefes darlığı ya da bayılma olursa 112'yi arayın. "
    "Bu bir tanı değildir; sonucu bir doktorun değerlendirmesi gerekir."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past any proxy of the machine's
MOST_STEPS, LEARNT, START_S = 600, 0.002, 120


def main() -> int:
    _install()
    FOLDER.mkdir(parents=True, exist_ok=True)
    _train()
    port = _free_port()
    with _server(port):
        said = _ask_plainly(f"http://127.0.0.1:{port}/v1")
        status, report = _check(f"http://127.0.0.1:{port}/v1")
    tokens = said["usage"]["total_tokens"]
    expected = {"commentary_status": "success", "commentary_model": said["model"], "commentary_tokens": tokens}
    expected["comment_text"] = TURKISH
    wrong = [name for name, value in expected.items() if report.get(name) != value]
    if status or wrong:
        print(f"FAILED: exit status {status}, not as expected: {', '.join(wrong) or 'nothing'}")
        return 1
    print(f"OK: success, model {said['model']}, {tokens} tokens, both as the server says")
    return 0


def _check(base_url: str) -> tuple[int, dict[str, Any]]:
    """Run the project's own check as a user would, without any key; its exit status and its report."""
    command = ["scripts/check_commentary_service.py", "--base-url", base_url, "--model", MODEL, "--text", ENGLISH]
    print("$ python", shlex.join(command), flush=True)
    keyless = {name: value for name, value in os.environ.items() if name not in ("deep_key", "DEEPSEEK_API_KEY")}
    done = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, *command], cwd=ROOT, env=keyless, stdout=subprocess.PIPE, encoding="utf-8", check=False
    )
    print(done.stdout, end="", flush=True)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


# --- the server ------------------------------------------------------------------------------------------------------


def _install() -> None:
    """The server's own environment; made once, and again when the constraints change."""
    complete, constraints = SERVING / "complete", ROOT / "constraints.txt"
    if complete.exists() and complete.stat().st_mtime >= constraints.stat().st_mtime:
        return
    print(f"Installing the environment {SERVING.name} (a few minutes the first time)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(SERVING)], check=True)  # noqa: S603 - fixed words
    pip = [str(SERVING / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "transformers[serving]", "torch", "-c", str(constraints)], check=True)  # noqa: S603 - fixed words
    complete.touch()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _server(port: int) -> Iterator[None]:
    """``transformers serve`` with the model, from its first answer to its orderly end."""
    command = [str(SERVING / "bin" / "transformers"), "serve", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    print("$ transformers", shlex.join(command[1:]), flush=True)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = FOLDER / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(  # noqa: S603 - the program installed above
            [*command, "--device", "cpu"], cwd=FOLDER, env=offline, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/health", log)
            yield
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            finally:
                server.kill()  # does nothing where it has ended
    orderly = "Application shutdown complete" in log.read_text(encoding="utf-8", errors="replace")
    print("server stopped", "in an orderly way" if orderly else f"with exit status {server.returncode}", flush=True)


def _wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < START_S and server.poll() is None:
        try:
            with _DIRECTLY.open(url, timeout=5):
                print(f"server answers after {time.monotonic() - started:.0f} s", flush=True)
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"The server did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def _ask_plainly(base_url: str) -> dict[str, Any]:
    """The server's answer to the client's question, asked without the client."""
    body = {"model": MODEL, "messages": messages(ENGLISH), "temperature": 0.2, "max_tokens": 2048}
    request = urllib.request.Request(
        f"{base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with _DIRECTLY.open(request, timeout=60) as response:
        return dict(json.load(response))


# --- the model -------------------------------------------------------------------------------------------------------


def _train() -> None:
    """Overfit a tiny Llama to the one prompt, rendered as the server will, and save it where the server looks."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    started = time.monotonic()
    torch.manual_seed(0)
    chat = messages(ENGLISH)
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=SPECIAL, initial_alphabet=every_byte)
    pieces.train_from_iterator([TURKISH, *(message["content"] for message in chat)], trainer)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=pieces)  # type: ignore[no-untyped-call]
    tokenizer.add_special_tokens({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer(TURKISH + "</s>", add_special_tokens=False)["input_ids"]
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=4096, **sizes)
    model = LlamaForCausalLM(config)
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    print(f"training: prompt of {len(prompt)} tokens, answer of {len(answer)}", flush=True)
    for step in range(1, MOST_STEPS + 1):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"  step {step}: loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
        if loss.item() < LEARNT:
            break
    else:
        raise SystemExit("The model did not learn its answer.")
    model.generation_config.do_sample = True  # or the client's temperature would be ignored
    model.save_pretrained(FOLDER / MODEL)
    tokenizer.save_pretrained(FOLDER / MODEL)


if __name__ == "__main__":
    sys.exit(main())
