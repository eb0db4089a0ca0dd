"""The demo's training: packed questions are answered as alone, a run resumes, and what it writes the endpoint loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from demo import batches, sparse
from demo.decoding import answers
from demo.muon import Muon, orthogonalised
from demo.network import MODEL_NAME, fresh_model, normalised, trained_model, write_checkpoint
from demo.packing import answer_losses, cross_entropy, join, pack, padded
from demo.questions import KINDS, NO_IMAGE, Question, ask, key_of
from demo.samples import PATCH, SIDE, diagnosis_at, image_at, rate_of, rate_target, sample_at
from demo.signals import draw_ecg
from demo.train import PLANS, main, stages_left
from demo.training import PROGRESS, Trainer
from pulse_ecg.anyres import merge_order, tile_image
from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.engine.scheduler import TransformersEngine
from pulse_ecg.generation import EncodedPrompt, ImagePrompt, TextGenerator
from pulse_ecg.params import load_defaults
from pulse_ecg.prompt import Conversation, Turn, prompt_ids
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return fresh_model(seed=3)


def told(
    model: LoadedModel,
    images: Sequence[Tensor],
    asked: Sequence[Sequence[Question]],
    shown: Sequence[int] | None = None,
) -> list[list[Tensor]]:
    """What each answer's tokens cost, by image and question; the images have ``shown`` tokens, or their own number."""
    sizes = shown or [len(image) for image in images]
    packs = [pack(qs, model.tokenizer, image_tokens=size) for qs, size in zip(asked, sizes, strict=True)]
    sequences = join(packs, [np.arange(len(image)) for image in images])
    losses = answer_losses(model.network, torch.cat([*images]), sequences).losses_A
    numbers = iter(range(len(losses)))
    return [[losses[sequences.question_A == next(numbers)] for _ in questions] for questions in asked]


def test_packed_questions_cost_what_each_costs_alone(model: LoadedModel) -> None:
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    width = model.config.llama.hidden_size
    images = [torch.randn(count, width, generator=generator) for count in (50, 90)]
    asked = [[ask(kind, draw_ecg(rng).diagnosis, rng) for kind in KINDS] for _ in images]
    with torch.no_grad():
        for image, questions, together in zip(images, asked, told(model, images, asked), strict=True):
            for question, losses in zip(questions, together, strict=True):
                [[alone]] = told(model, [image], [[question]])
                torch.testing.assert_close(losses, alone, atol=1e-4, rtol=1e-4)


def test_questions_without_an_image_are_the_endpoints_own_prompts(model: LoadedModel) -> None:
    """Between images in the batch, with the losses that a plain pass over prompt and answer gives; features that
    came all the same change nothing."""
    rng, width = np.random.default_rng(0), model.config.llama.hidden_size
    asked = [replace(ask(kind, draw_ecg(rng).diagnosis, rng), answer=NO_IMAGE, close=()) for kind in KINDS[:3]]
    with torch.no_grad():
        images = [torch.randn(50, width), torch.randn(30, width), torch.randn(50, width)]
        _, without, _ = told(model, images, [asked] * 3, shown=[50, 0, 50])
        for question, losses in zip(asked, without, strict=True):
            ids = prompt_ids(
                Conversation((Turn("user", question.text),)),
                with_image=False,
                tokenizer=model.tokenizer,
                context_length=4096,
            )
            said = [*model.tokenizer.encode(NO_IMAGE), model.tokenizer.eos_id]
            logits = model.network.language_model(input_ids=torch.tensor([[*ids, *said]])).logits[0]
            expected = functional.cross_entropy(logits[len(ids) - 1 : -1], torch.tensor(said), reduction="none")
            torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", ["read", "both"])
def test_some_questions_of_a_training_come_without_their_image(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path, replace(PLANS["cpu"][stage], batch=1), device="cpu", workers=0)
    monkeypatch.setattr(batches, "_FOREIGN_SHARE", 0.0)
    for share in (0.0, 1.0):
        monkeypatch.setattr(batches, "_NO_IMAGE_SHARE", share)
        with torch.no_grad():
            losses = trainer.losses(next(trainer._batches))
        names = {name for name in losses if name.startswith(("answer", "no im"))}
        assert names == {"no image"} if share else names >= {"answer rate", "answer rhythm"} and "no image" not in names
        assert (losses["rate read"] == 0) == (share == 1)


def test_the_rate_that_is_read_counts_by_image_and_not_by_token(tmp_path: Path) -> None:
    """Three digits or two, one question about it or four: the tokens' weights of an image sum to one."""
    trainer = Trainer(tmp_path, replace(PLANS["cpu"]["both"], batch=6), device="cpu", workers=0)
    asked = next(trainer._batches).asked
    assert asked is not None
    rates, at = torch.unique(asked.rate_A, return_inverse=True)
    sums = torch.zeros(len(rates)).index_add(0, at, asked.rate_weight_A)
    assert len(rates) > 3
    assert all(float(total) == pytest.approx(round(float(total)), abs=1e-4) for total in sums)
    assert 3 <= float(sums.sum()) <= 6


def test_a_part_of_an_image_keeps_its_places(model: LoadedModel) -> None:
    """Given half of an image's tokens, those and the answer stand where they stood."""
    rng = np.random.default_rng(0)
    packed = pack([ask("rhythm", draw_ecg(rng).diagnosis, rng)], model.tokenizer, image_tokens=40)
    whole, half = (join([packed], [np.arange(0, 40, step)]).position_BL[0].tolist() for step in (1, 2))
    start = len(packed.before)
    everything = list(range(start + 40 + len(packed.after)))
    assert whole == everything
    assert half == [*everything[:start], *everything[start : start + 40 : 2], *everything[start + 40 :]]


def test_workers_draw_different_images_and_a_later_run_new_ones(model: LoadedModel) -> None:
    plan = replace(PLANS["cpu"]["see"], batch=2, fresh=2, keep=0)
    stream = batches.batches(plan, model.tokenizer, first=10, workers=2)
    drawn = [next(stream) for _ in range(4)]
    assert [batch.beyond for batch in drawn] == [13, 14, 17, 18]
    later = next(batches.batches(plan, model.tokenizer, first=drawn[-1].beyond, workers=0))
    overviews = [{page.numpy().tobytes() for page in batch.pixels} for batch in (*drawn, later)]
    assert len(set.union(*overviews)) == sum(map(len, overviews))


@pytest.mark.parametrize("stage", ["see", "both"])
def test_a_part_of_a_batch_is_that_part_of_its_images(
    stage: Any, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels, the places, the truth and the positions in the prompt of each chosen patch belong together."""
    monkeypatch.setattr(batches, "_SPARSE_SHARE", 1.0)
    monkeypatch.setattr(batches, "_FOREIGN_SHARE", 0.0)
    monkeypatch.setattr(batches, "_NO_IMAGE_SHARE", 0.0)
    plan = replace(PLANS["cuda"][stage], batch=3, fresh=3)
    batch = next(batches.batches(plan, model.tokenizer, first=0, workers=0))
    assert batch.place_TK is not None
    samples = [sample_at("train", index, plain=index % 4 > 0) for index in range(3)]
    owners = batch.truth.owner_P.view(len(batch.pixels), -1)
    leads = batch.truth.lead_P.view(owners.shape)
    for number, sample in enumerate(samples):
        [rows] = (owners[:, 0] == number).nonzero(as_tuple=True)
        count = len(sample.tiles_THWC)
        tiles = np.arange(count - len(rows), count)  # the overview may be left out
        chosen = batch.place_TK[rows].numpy() + SIDE * SIDE * tiles[:, None]
        assert (batch.pixels[rows].numpy() == sparse.patch_pixels(sample, chosen)).all()
        assert (leads[rows].numpy() == sample.patches.lead_TSS.ravel()[chosen]).all()
        if batch.asked:
            sequences = batch.asked.sequences
            source = sequences.source_BL[number] - len(sequences.text_N)
            seen = (source >= 0) & (source < owners.numel())
            positions = sequences.position_BL[number][seen]
            assert (owners.ravel()[source[seen]] == number).all()
            assert (positions - positions[0] == torch.from_numpy(chosen.ravel() - chosen[0, 0])).all()


def test_a_device_without_a_plan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--device", "meta"])
    assert "cpu and cuda" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """With its weights, its optimisers' state, its heads and its clock; on images that it has not seen."""
    plan = replace(PLANS["cpu"]["see"], steps=4, batch=2, fresh=1)
    first = Trainer(tmp_path, plan, device="cpu", workers=0)
    first.train_step()
    first.save()
    second = Trainer(tmp_path, plan, device="cpu", workers=0)
    assert (second.step, second.first, second.seconds) == (1, 2, first.seconds)
    for before, after in ((first.network, second.network), (first.heads, second.heads)):
        assert alike(before.state_dict(), after.state_dict())
    for one, other in zip(first._optimisers, second._optimisers, strict=True):
        assert one.state_dict()["state"]
        assert alike(one.state_dict()["state"], other.state_dict()["state"])
    second.train_step()
    assert second.step == 2


def test_a_run_that_goes_on_under_another_plan_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = replace(PLANS["cpu"]["see"], steps=4, batch=2, fresh=1)
    Trainer(tmp_path, plan, device="cpu", workers=0).save()
    Trainer(tmp_path, plan, device="cpu", workers=0)
    assert "another plan" not in caplog.text
    Trainer(tmp_path, replace(plan, steps=5), device="cpu", workers=0)
    assert "another plan" in caplog.text


def test_one_seed_gives_one_training(tmp_path: Path) -> None:
    plan = replace(PLANS["cpu"]["see"], steps=4, batch=2, fresh=1)
    losses = [Trainer(tmp_path, replace(plan, seed=s), device="cpu", workers=0).train_step() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_resumed_run_does_not_go_back_to_an_earlier_stage(tmp_path: Path) -> None:
    assert stages_left(tmp_path) == ["see", "read", "both"]
    Trainer(tmp_path, replace(PLANS["cpu"]["read"], batch=2, fresh=1), device="cpu", workers=0).save()
    assert stages_left(tmp_path) == ["read", "both"]


def test_one_command_runs_all_stages_and_leaves_a_checkpoint_and_a_plot(tmp_path: Path) -> None:
    given = {"device": "cpu", "steps": 1, "batch": 2, "fresh": 1, "held-out": 2, "workers": 0}
    main([str(tmp_path), *[f"--{name}={value}" for name, value in given.items()]])
    assert trained_model(tmp_path / "checkpoint").config.name == MODEL_NAME
    stages = [json.loads(line)["stage"] for line in (tmp_path / PROGRESS).read_text().splitlines()]
    assert stages == ["see", "read", "both"]
    with Image.open(tmp_path / "progress.png") as plot:
        assert plot.width > 300


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("stage", ["see", "read", "both"])
def test_each_stage_changes_what_it_trains_and_nothing_else(stage: Any, kind: str, tmp_path: Path) -> None:
    plan = replace(PLANS[kind][stage], steps=3, batch=2, fresh=1)
    trainer = Trainer(tmp_path, plan, device=kind if torch.cuda.is_available() else "cpu", workers=0)
    before = {name: weight.clone() for name, weight in trainer.network.state_dict().items()}
    losses = trainer.train_step()
    assert all(np.isfinite(loss) for loss in losses.values())
    after = trainer.network.state_dict()
    changed = {name.split(".")[0] for name, weight in after.items() if not weight.equal(before[name])}
    tower, language = {"vision_tower"}, {"language_model", "mm_projector"}
    assert changed == {"see": tower, "read": language, "both": tower | language}[stage]


def test_what_is_written_loads_and_answers_alike(model: LoadedModel, tmp_path: Path) -> None:
    write_checkpoint(model.network, tmp_path / "checkpoint")
    loaded = trained_model(write_checkpoint(model.network, tmp_path / "checkpoint"))  # the second replaces the first
    assert loaded.config.name == MODEL_NAME
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 20_000_000
    for name, owner, attribute, _ in model.network.checkpoint_parameters():
        stored = {n: getattr(o, a) for n, o, a, _ in loaded.network.checkpoint_parameters()}[name]
        torch.testing.assert_close(stored, getattr(owner, attribute).half().float())


def test_the_evaluation_decodes_as_the_endpoint_does() -> None:
    """Whole answers of different lengths, to their ends."""
    model = trained_model(ROOT / "demo" / "checkpoint")
    image, _ = image_at("test", 1)
    questions = ["What is the heart rate?", "Write a report of this ECG.", "Is there ST elevation in this ECG?"]
    tiles = tile_image(image, model.config.preprocessing)
    order = merge_order("flat", grid=tiles.grid, side=model.config.patches_per_side, image_size=tiles.image_size)
    params = replace(load_defaults(ROOT), max_new_tokens=64, do_sample=False, repetition_penalty=1.0)
    found = answers(model, torch.from_numpy(tiles.pixels_TCHW), questions)
    assert len({len(answer) for answer in found}) == len(found)
    # The engine's attention stays on its network: it gets one of its own.
    engine = TransformersEngine(replace(model, network=copy.deepcopy(model.network)), max_slots=1)
    for question, answer in zip(questions, found, strict=True):
        conversation = Conversation((Turn("user", question),))
        ids = prompt_ids(conversation, with_image=True, tokenizer=model.tokenizer, context_length=4096)
        prompt = EncodedPrompt(ids, ImagePrompt("test", tiles.image_size, order, tiles))
        assert TextGenerator(engine, model.config, model.tokenizer).generate(prompt, params).text == answer


def test_the_tower_on_all_patches_is_the_tower(model: LoadedModel) -> None:
    sample = sample_at("train", 2)
    everything = np.arange(len(sample.tiles_THWC) * SIDE * SIDE).reshape(-1, SIDE * SIDE)
    pixels = torch.from_numpy(sparse.patch_pixels(sample, everything))
    with torch.no_grad():
        some = sparse.encode(model.network, pixels, torch.from_numpy(everything % sparse.PATCHES))
        whole = model.network.vision_tower(normalised(torch.from_numpy(sample.tiles_THWC))).last_hidden_state[:, 1:]
    torch.testing.assert_close(some, whole, atol=1e-3, rtol=1e-3)


def test_chosen_patches_are_those_with_a_trace_first() -> None:
    sample = sample_at("train", 2)
    chosen = sparse.choose(sample, np.random.default_rng(0), 40)
    leads = sample.patches.lead_TSS.ravel()
    on_trace = (leads[chosen] > 0).sum(axis=1)
    available = (leads.reshape(-1, SIDE * SIDE) > 0).sum(axis=1)[chosen[:, 0] // (SIDE * SIDE)]
    assert (on_trace == np.minimum(available, 40)).all()


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_the_optimisers_update_has_one_size_in_all_directions(shape: tuple[int, int]) -> None:
    """Whatever the gradient: its singular values become nearly equal, and its singular vectors stay."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    gradient = u @ torch.diag(torch.logspace(0, -1.2, min(shape))) @ vh
    other = torch.randn(shape, generator=generator)
    in_its_basis = u.T @ orthogonalised(torch.stack([other, gradient]))[1] @ vh.T
    assert ((torch.diagonal(in_its_basis) - 1).abs() < 0.35).all()
    assert (in_its_basis - torch.diag(torch.diagonal(in_its_basis))).abs().max() < 1e-4


def test_matrices_of_one_shape_are_updated_as_each_alone() -> None:
    def updated(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        matrices = [torch.nn.Parameter(torch.zeros(6, 4)) for _ in gradients]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient
        Muon(matrices, lr=0.1).step()
        return [matrix.data for matrix in matrices]

    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(6, 4, generator=generator) * scale for scale in (1e-3, 1.0, 50.0)]
    for gradient, together in zip(gradients, updated(gradients), strict=True):
        assert together.abs().max() > 0.01
        torch.testing.assert_close(together, updated([gradient])[0], atol=1e-6, rtol=1e-4)


def test_a_rate_close_to_the_true_one_is_nearly_as_good(model: LoadedModel) -> None:
    """Each digit's shares are those of the rates that begin so, and the whole answers' shares are a bell curve."""
    diagnosis = replace(draw_ecg(np.random.default_rng(3)).diagnosis, rate=100)
    question = ask("rate", diagnosis, np.random.default_rng(0))
    packed = pack([question], model.tokenizer, image_tokens=40)
    said = [(label, shares) for label, shares in zip(packed.labels, packed.shares, strict=True) if shares]
    assert all(sum(shares.values()) == pytest.approx(1) and label in shares for label, shares in said)
    digits = [{model.tokenizer.decode([token]): share for token, share in shares.items()} for _, shares in said]
    first, *others = [shares for shares in digits if len(shares) > 1]
    below = sum(weight for text, weight in question.close if int(key_of("rate", text)) < 100)
    whole = 1 + sum(weight for _, weight in question.close)
    assert first == pytest.approx({"1": 1 - below / whole, "9": below / whole})
    true = [shares[digit] for shares, digit in zip(others, "00"[-len(others) :], strict=True)]
    assert first["1"] * np.prod(true) == pytest.approx(1 / whole)
    weights = {int(key_of("rate", text)): weight for text, weight in question.close}
    assert 1 > weights[101] == weights[99] > weights[103] > weights[106] > 0


def test_patches_are_cut_in_the_order_of_the_tower() -> None:
    sample = sample_at("train", 2)
    tiles, last = sample.tiles_THWC, len(sample.tiles_THWC) - 1
    chosen = np.array([[0, 13], [last * SIDE * SIDE + 5, last * SIDE * SIDE + 30]])
    pixels = sparse.patch_pixels(sample, chosen).reshape(2, 2, 3, PATCH, PATCH)
    for row, tile in enumerate((0, last)):
        for column, place in enumerate(chosen[row] % (SIDE * SIDE)):
            top, left = place // SIDE * PATCH, place % SIDE * PATCH
            expected = tiles[tile, top : top + PATCH, left : left + PATCH].transpose(2, 0, 1)
            assert (pixels[row, column] == expected).all()


def test_the_rates_target_is_the_rate() -> None:
    for index in range(5):
        diagnosis = diagnosis_at("train", index)
        assert float(rate_of(torch.tensor(rate_target(diagnosis)))) == pytest.approx(diagnosis.rate, abs=1e-3)


def test_the_cost_of_shares_is_their_cross_entropy() -> None:
    """Nothing costs less than to expect the shares themselves; with one possible token it is the usual loss."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    hard = cross_entropy(logits, *padded([{4: 1.0}, {0: 1.0}, {49: 1.0}]))
    torch.testing.assert_close(hard, functional.cross_entropy(logits, torch.tensor([4, 0, 49]), reduction="none"))
    shares = {7: 0.25, 9: 0.75}
    expected = torch.full((1, 50), -30.0)
    expected[0, 7], expected[0, 9] = np.log(0.25), np.log(0.75)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert float(cross_entropy(expected, *padded([shares]))) == pytest.approx(entropy, abs=1e-5)
    assert float(cross_entropy(expected.roll(1), *padded([shares]))) > 5


def test_the_optimiser_finds_a_minimum() -> None:
    goal = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    matrix = torch.nn.Parameter(torch.zeros(12, 6))
    optimiser = Muon([matrix], lr=0.1)
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimiser.zero_grad()
        (matrix - goal).square().sum().backward()
        optimiser.step()
    assert (matrix - goal).abs().max() < 0.05
