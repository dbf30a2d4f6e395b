"""Calibration: what is found out about a model by running it, and that results are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")
transformers = pytest.importorskip("transformers", reason="needs transformers, from the extra [run]")

import numpy as np  # noqa: E402

from kvstream.codec import registry, uniform  # noqa: E402
from kvstream.codec.errors import CodecError  # noqa: E402
from kvstream.codec.profile import Profile  # noqa: E402
from kvstream.testbed.encoding import calibrate, gradients, insight, texts  # noqa: E402
from kvstream.testbed.engine.loading import load_model  # noqa: E402
from kvstream.testbed.engine.model import Model, calculate_kv, mean_kl  # noqa: E402
from kvstream.testbed.errors import SpecError  # noqa: E402
from kvstream.testbed.workloads import precomputed  # noqa: E402
from kvstream.testbed.workloads.contexts import BUNDLED_CONTEXTS, ENGLISH_CONTEXTS, load_contexts  # noqa: E402

if TYPE_CHECKING:
    from kvstream.testbed.encoding.calibrate import Sample

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def build(config_class: str, model_class: str, **settings: Any) -> Model:
    torch.manual_seed(1)
    network = getattr(transformers, model_class)(getattr(transformers, config_class)(**SMALL | settings)).eval()
    return Model(network, None, config_class, "0" * 64)


@pytest.mark.parametrize(
    ("config_class", "model_class", "settings", "rotary", "interleaved"),
    [
        ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 8}, 8, False),
        ("MistralConfig", "MistralForCausalLM", {"head_dim": 8, "sliding_window": 64}, 8, False),
        ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}, 16, False),
        ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 8, "sliding_window": 64}, 8, False),
        ("PhiConfig", "PhiForCausalLM", {"num_key_value_heads": 4}, 4, False),
        ("CohereConfig", "CohereForCausalLM", {}, 8, True),
    ],
)
def test_rope_is_found_by_experiment(
    config_class: str, model_class: str, settings: dict[str, Any], rotary: int, interleaved: bool
) -> None:
    model = build(config_class, model_class, **settings)
    rope = calibrate.rope_of(model)
    assert rope is not None
    assert rope.inv_freq.shape == (3, rotary // 2)
    assert rope.interleaved == interleaved


def test_layers_may_rotate_differently() -> None:
    """Gemma 3 turns the keys of its global layers by other angles than those of its sliding ones."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = build("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, sliding_window=64, layer_types=kinds)
    rope = calibrate.rope_of(model)
    assert rope is not None
    assert torch.equal(rope.inv_freq[0], rope.inv_freq[2])
    assert not torch.equal(rope.inv_freq[0], rope.inv_freq[1])


def test_a_model_without_rope_has_none() -> None:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=1024, bos_token_id=None, eos_token_id=None
    )
    model = Model(transformers.GPT2LMHeadModel(config).eval(), None, "gpt2", "0" * 64)
    assert calibrate.rope_of(model) is None


def test_the_sensitivity_predicts_the_divergence(tiny_model: Model) -> None:
    """Half of e' F e, summed over cached tokens, is the KL divergence that small errors in a head's vectors cause."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (70,), generator=draw).tolist()
    sample = calibrate.Sample(tuple(ids[:40]), tuple(ids[40:]))
    rope = calibrate.rope_of(tiny_model)
    exact = calculate_kv(tiny_model, sample.context_ids)
    found = gradients.sensitivity(tiny_model, [exact] * 60, [sample.suffix_ids] * 60, rope)
    assert found.sinks == 0
    fisher = found.metric
    wanted = calibrate.log_probs(tiny_model, exact, sample.suffix_ids)
    predicted, measured = [], []
    for layer, side, head in ((0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, 0), (2, 1, 1)):
        own = fisher[layer, side, head].double()
        size = 0.02 * float(exact[layer, side, :, head].std())
        kl = 0.0
        for _ in range(4):
            changed = exact.clone()
            changed[layer, side, :, head] += size * torch.randn((40, 16), generator=draw)
            kl += mean_kl(wanted, calibrate.log_probs(tiny_model, changed, sample.suffix_ids)) / 4
        # An isotropic error looks the same turned back or not, so only the trace of F counts.
        predicted.append(0.5 * size**2 * 40 * float(own.trace()) / len(sample.suffix_ids))
        measured.append(kl)
    ratio = torch.tensor(measured) / torch.tensor(predicted)
    assert float(ratio.min()) > 0.5
    assert float(ratio.max()) < 2.0


def test_sinks_are_the_first_tokens_that_stand_apart() -> None:
    draw = torch.Generator().manual_seed(5)
    ordinary = torch.rand((4, 200), generator=draw).double() * 5
    with_sinks = ordinary.clone()
    with_sinks[:, :2] = 1e4
    with_sinks[:, 3] = 1e4  # after an ordinary one: not among the first
    assert gradients.count_sinks(list(ordinary)) == 0
    assert gradients.count_sinks(list(with_sinks)) == 2
    assert gradients.count_sinks([*with_sinks[:3], ordinary[3]]) == 2
    assert gradients.count_sinks([with_sinks[0], *ordinary[1:]]) == 0
    assert gradients.count_sinks([torch.cat([torch.full((20,), 1e4).double(), row]) for row in ordinary]) == 16


def test_a_sink_stands_out_though_one_layer_alone_has_it() -> None:
    """Each layer's keys and values count by their own median; where that is nothing, they say nothing."""
    gradient = torch.ones((3, 2, 50, 2, 4))
    gradient[0, 1, 0] = 1_000.0
    gradient[2] = 0.0
    gradient[2, 0, 7] = 1.0
    energy = gradients.token_energy(gradient)
    assert energy[1:].tolist() == [1.0] * 49
    assert float(energy[0]) == pytest.approx((1e6 + 3) / 4)
    assert gradients.count_sinks([energy]) == 1


def test_the_sensitivity_leaves_sinks_out(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [index * 37 % 256 for index in range(60)]
    exact = calculate_kv(tiny_model, ids[:40])
    monkeypatch.setattr(gradients, "count_sinks", lambda energies: 3)
    found = gradients.sensitivity(tiny_model, [exact], [ids[40:]], None)
    gradient = gradients._gradient(tiny_model, exact, ids[40:], 0)[:, :, 3:]
    wanted = torch.einsum("lsthd,lsthe->lshde", gradient, gradient) / 37
    assert found.sinks == 3
    assert torch.allclose(found.metric, wanted, rtol=1e-4)


@pytest.mark.parametrize(("positions", "lengths"), [(256, (128, 64)), (1024, (512, 256)), (8192, (1536, 256))])
def test_samples_fit_into_a_models_positions(
    positions: int, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model()
    monkeypatch.setattr(model.network.config, "max_position_embeddings", positions)
    context, suffix = lengths
    for sample in calibrate.samples(model, "fit", 3):
        assert len(sample.context_ids) == context
        assert suffix <= len(sample.suffix_ids) <= suffix + min(256, positions // 4)
        assert len(sample.context_ids) + len(sample.suffix_ids) <= positions


@pytest.mark.parametrize("name", texts.CHECKS)
def test_every_text_makes_whole_samples(name: str) -> None:
    model = load_model()
    for sample in calibrate.samples(model, name, 3):
        assert len(sample.context_ids) == 1536
        assert len(sample.suffix_ids) >= 256
    fitted = {line for kind in set(texts.FIT) for text in texts.documents(kind) for line in text.split(b"\n")}
    longer = [line for text in texts.documents(name) for line in text.split(b"\n") if len(line) > 60]
    assert sum(line in fitted for line in longer) < 0.02 * len(longer)


def test_the_first_contexts_hold_every_kind_of_text() -> None:
    assert {texts.FIT[seed] for seed in range(calibrate.GRADIENT_SAMPLES)} == set(texts.FIT)
    assert texts.fit_texts(2) == texts.fit_texts(10) == texts.documents("fit-language")
    with pytest.raises(SpecError, match="unknown text 'chess'; choose from check, check-prose"):
        texts.documents("chess")


def test_a_model_with_too_few_positions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model()
    monkeypatch.setattr(model.network.config, "max_position_embeddings", 64)
    with pytest.raises(SpecError, match="has 64 positions; calibration needs a model with 128 or more"):
        next(calibrate.samples(model, "fit", 1))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(calibrate, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(calibrate, "FIT_SAMPLES", 3)
    monkeypatch.setattr(calibrate, "CHECK_SAMPLES", 2)
    short = calibrate.samples

    def samples(model: Model, split: str, count: int) -> Any:
        return short(model, split, count, context_tokens=300)

    monkeypatch.setattr(calibrate, "samples", samples)
    monkeypatch.setattr(calibrate, "SUFFIX_TOKENS", 60)
    return tmp_path


@pytest.mark.parametrize("name", ["kvstream", "cachegen"])
def test_profiles_are_fitted_once_and_distortion_falls(quick: Path, tiny_model: Model, name: str) -> None:
    said: list[str] = []
    codec = calibrate.make_codec(name, tiny_model, said.append)
    assert any("calibrating" in line for line in said)
    assert ("attention sinks: none" in said) == (name == "kvstream")
    assert codec.profile is not None
    assert codec.profile.metadata["model"] == tiny_model.fingerprint
    assert ("usual" in codec.profile.tensors) == (name == "kvstream")
    ladder = calibrate.distortions(tiny_model, codec, 100, said.append)
    assert len(ladder) == len(codec.levels)
    assert ladder[-1] < 0.3 * ladder[0]
    said.clear()
    again = calibrate.make_codec(name, tiny_model, said.append)
    assert again.profile_sha256 == codec.profile_sha256
    assert calibrate.distortions(tiny_model, again, 100, said.append) == ladder
    assert said == []


def test_samples_hold_their_answers_and_the_splits_differ() -> None:
    model = load_model()

    def first(split: str) -> Sample:
        return next(calibrate.samples(model, split, 1, context_tokens=600))

    fit, check = first("fit"), first("check")
    assert len(fit.context_ids) == len(check.context_ids) == 600
    assert fit != check
    assert first("fit") == fit
    context, suffix = bytes(fit.context_ids), bytes(fit.suffix_ids)
    asked = [line for line in suffix.split(b"\n") if b"REGISTER is <" in line and line in context]
    assert len(asked) >= 2


def test_every_stage_that_takes_long_is_tracked(quick: Path, tiny_model: Model) -> None:
    stages: list[str] = []

    def track(items: Sequence[Any], about: str) -> Sequence[Any]:
        stages.append(f"{about}: {len(items)}")
        return items

    said: list[str] = []
    calibrate.calibrate("kvstream", tiny_model, said.append, track)
    assert stages == ["computing caches: 3", "measuring the sensitivity: 3", "computing caches of held-out text: 2"]
    assert said[-1] == "measuring what chunks of held-out text take"
    stages.clear()
    insight.measure(tiny_model, track, contexts=1)
    assert stages == ["computing caches: 1", "rounding one layer at a time: 3"]


def test_a_profile_of_another_model_is_refused_unless_forced(quick: Path, tiny_model: Model) -> None:
    own = calibrate.profile_of("cachegen", tiny_model)
    other = Profile(own.tensors, {**own.metadata, "model": "f" * 64})
    assert calibrate.make_codec("cachegen", tiny_model, profile=own).profile_sha256 == own.sha256
    with pytest.raises(CodecError, match="force it"):
        calibrate.make_codec("cachegen", tiny_model, profile=other)
    assert calibrate.make_codec("cachegen", tiny_model, profile=other, force=True).profile_sha256 == other.sha256
    assert calibrate.make_codec("raw", tiny_model, profile=other).profile is None
    (file,) = (quick / "profiles").iterdir()
    file.write_bytes(other.to_bytes())
    with pytest.raises(CodecError, match="calibrated for model"):
        calibrate.make_codec("cachegen", tiny_model)


@pytest.mark.parametrize("name", ["kvstream", "cachegen", "uniform"])
def test_what_ships_is_what_a_first_run_asks_for(name: str) -> None:
    """Profile and distortions are found under today's settings, and the contexts' manifests agree with them."""
    offer = precomputed.load("docs", name)
    assert offer is not None
    profile = calibrate.existing_profile(name, offer.manifest.model) if offer.manifest.profile else None
    codec = registry.make(name, profile=profile)
    assert codec.profile_sha256 == offer.manifest.profile
    measured = calibrate.existing_distortions(offer.manifest.model, codec, precomputed.CHUNK_TOKENS)
    assert measured == tuple(level.distortion for level in offer.manifest.levels)
    assert (offer.manifest.shift is not None) == (name == "kvstream")


def test_contexts_are_judged_by_text_of_their_own_kind() -> None:
    """All shipped ones with key-value lines are like the calibration's text, on which their distortions stand."""
    for folder, kind in ((BUNDLED_CONTEXTS, "check"), (ENGLISH_CONTEXTS, "check-prose")):
        assert {texts.kind_of(context.text) for context in load_contexts(folder)} == {kind}
    for kind in texts.CHECKS:
        for document in texts.documents(kind):
            assert texts.kind_of(document[:1_000]) == kind
    assert texts.kind_of(b"") in texts.CHECKS


def test_codecs_without_a_profile_need_no_calibration(tiny_model: Model) -> None:
    assert calibrate.make_codec("raw", tiny_model).profile is None
    with pytest.raises(SpecError, match="needs no calibration"):
        calibrate.calibrate("raw", tiny_model)


class Scaled(uniform.Uniform):
    """A plug-in that is fitted to a model: it keeps the largest magnitude that it was shown."""

    codec_id = "scaled"
    needs_profile = True

    @classmethod
    def fit(cls, kv_samples: Iterable[torch.Tensor], *, metadata: Mapping[str, Any]) -> Profile:
        largest = max(float(kv.abs().max()) for kv in kv_samples)
        return Profile({"largest": np.array([largest], np.float32)}, {**metadata, "codec": cls.codec_id})


def test_plug_ins_are_calibrated_by_their_fit(quick: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "codec_class", lambda name: Scaled)
    codec = calibrate.make_codec("scaled", tiny_model)
    assert codec.profile is not None
    assert codec.profile.metadata["model"] == tiny_model.fingerprint
    assert float(codec.profile.tensors["largest"][0]) > 0
    monkeypatch.delattr(Scaled, "fit")
    with pytest.raises(CodecError, match=r"codec scaled cannot be calibrated: its class has no method fit"):
        calibrate.calibrate("scaled", tiny_model)


def test_a_fresh_profile_takes_the_place_of_the_kept_one(quick: Path, tiny_model: Model) -> None:
    kept = calibrate.profile_of("cachegen", tiny_model)
    (file,) = (quick / "profiles").iterdir()
    file.write_bytes(b"another version's")
    said: list[str] = []
    assert calibrate.profile_of("cachegen", tiny_model, said.append, fresh=True).sha256 == kept.sha256
    assert calibrate.profile_of("cachegen", tiny_model).sha256 == kept.sha256
    assert len(said) == 1
