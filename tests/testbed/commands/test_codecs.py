"""`kvstream codec ...` on a tiny model of random weights: what is printed adds up, what is drawn exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")
pytest.importorskip("transformers", reason="needs transformers, from the extra [run]")

from kvstream.codec import cachegen, registry  # noqa: E402
from kvstream.codec.kvstream import fit  # noqa: E402
from kvstream.testbed.cli import main  # noqa: E402
from kvstream.testbed.encoding import bench, calibrate, insight  # noqa: E402
from kvstream.testbed.engine.loading import load_model  # noqa: E402
from kvstream.testbed.errors import SpecError  # noqa: E402
from kvstream.testbed.report import codec_figures  # noqa: E402
from tests.codec.synthetic import synthetic_kv  # noqa: E402
from tests.testbed.run.test_check_inputs import context_file  # noqa: E402

if TYPE_CHECKING:
    from kvstream.testbed.engine.model import Model

KV = synthetic_kv(3, 300, 2, 8, seed=4)


@pytest.fixture(scope="module")
def found(tiny_model: Model) -> insight.Insight:
    sample = calibrate.Sample(tuple(i * 37 % 256 for i in range(120)), tuple(range(20)))
    patch = pytest.MonkeyPatch()
    patch.setattr(calibrate, "samples", lambda model, split, count: [sample] * count)
    try:
        return insight.measure(tiny_model, contexts=2)
    finally:
        patch.undo()


def test_insight_has_three_answers(found: insight.Insight) -> None:
    assert list(found.deltas) == ["keys", "keys, RoPE undone", "values"]
    assert all(len(deltas.to_anchor) == 3 * 2 * 16 for deltas in found.deltas.values())
    assert len(found.sensitivity) == 3
    assert min(kl for pair in found.sensitivity for kl in pair) > 0
    for side in (0, 1):
        together, best = (found.entropy[name][side] for name in ("one distribution", "by layer and channel"))
        assert 0 < best < together < 8
    plain = json.loads(json.dumps(found.to_json()))
    assert 0 <= plain["deltas"]["values"]["to_anchor"]["above_1"] <= 1
    assert "RoPE undone" in insight.text(found)


def test_deltas_of_noise_and_of_a_slow_walk_differ() -> None:
    """Independent tokens: deltas have twice the variance. A slow walk: far less."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 5000, 1, 4), generator=draw)
    deltas = insight._deltas([noise])
    assert np.allclose(deltas.to_previous, 0.5, rtol=0.1)
    assert np.allclose(deltas.to_anchor, 0.5, rtol=0.1)
    assert min(insight._deltas([noise.cumsum(dim=1)]).to_anchor) > 20


def test_entropy_is_that_of_a_known_distribution() -> None:
    draw = np.random.default_rng(0)
    assert insight._entropy(draw.integers(0, 8, (4, 50_000)).astype(np.uint8)) == pytest.approx(3, abs=0.01)
    assert insight._entropy(np.zeros((2, 10), np.uint8)) == 0


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_figures_are_written(found: insight.Insight, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("seaborn", reason="figures need seaborn, from the extra [run]")
    row = {"codec": "kvstream", "bits_per_element": 1.0, "distortion": 0.1, "english": None}
    rows = [row | {"lines": {"right": right, "asked": 4}} for right in (3, 4)]
    codec_figures.rate_distortion(rows, tmp_path / f"r.{suffix}")
    codec_figures.insight(found, tmp_path / f"i.{suffix}")
    assert all(file.stat().st_size > 5_000 for file in tmp_path.iterdir())
    with pytest.raises(SpecError, match=r"r\.txt: a figure must end in"):
        codec_figures.check_path(tmp_path / "r.txt")


def test_inspect_tells_bits_by_layer_where_it_has_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "cache_dir", lambda: tmp_path)
    profile = cachegen.fit([KV])
    data = registry.make("cachegen", {}, profile).encode(KV, 1, positions=range(300))
    (tmp_path / "chunk").write_bytes(data)

    assert "bits_by_layer" not in inspected(tmp_path / "chunk", capsys)
    (tmp_path / "p").write_bytes(profile.to_bytes())
    given = inspected(tmp_path / "chunk", capsys, "--profile", str(tmp_path / "p"))
    assert np.shape(given["bits_by_layer"]) == (3, 2)
    assert given["ideal_bits_per_element"] < given["bits_per_element"] == 8 * len(data) / KV.numel()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "p").rename(tmp_path / "profiles" / "p.safetensors")
    assert inspected(tmp_path / "chunk", capsys) == given
    assert main(["codec", "inspect", str(tmp_path / "chunk")]) == 0
    said = capsys.readouterr().out
    assert "layer     keys  values" in said
    assert "entropy of the coder's model" in said


def test_inspect_tells_bits_by_group_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = fit([KV], target_bits=(1.2, 2.4), group=2)
    (tmp_path / "chunk").write_bytes(registry.make("kvstream", {}, profile).encode(KV, 1, positions=range(300)))
    (tmp_path / "p").write_bytes(profile.to_bytes())
    assert len(inspected(tmp_path / "chunk", capsys, "--profile", str(tmp_path / "p"))["bits_by_group"]) == 2
    assert main(["codec", "inspect", str(tmp_path / "chunk"), "--profile", str(tmp_path / "p")]) == 0
    said = capsys.readouterr().out
    assert "  layers 0-1: " in said
    assert "  layers 2-2: " in said


def inspected(file: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["codec", "inspect", str(file), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_is_written_is_told_as_json_and_nothing_else(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "distortions", lambda model, codec, *_: [0.0] * len(codec.levels))
    book, chunk, kv = str(context_file(tmp_path)), str(tmp_path / "chunk"), str(tmp_path / "kv.safetensors")

    def told(*argv: str) -> dict[str, Any]:
        assert main([*argv, "--model", str(tiny_folder), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    encoded = told("codec", "encode", book, chunk, "--codec", "uniform", "--level", "1", "--chunk-tokens", "64")
    assert (encoded["file"], encoded["context"], encoded["tokens"]) == (chunk, "my-book", [0, 64])
    assert encoded["bytes"] == Path(chunk).stat().st_size
    decoded = told("codec", "decode", chunk, kv, "--codec", "uniform")
    assert (decoded["file"], decoded["shape"][:3]) == (kv, [3, 2, 64])
    stored = told("store", book, "--codec", "raw", "--chunk-tokens", "64")
    [entry] = stored["contexts"]
    assert (entry["context"], entry["codec"]) == (book, "raw")
    assert (Path(stored["store"]) / "contexts" / entry["id"] / "manifest.json").is_file()


def test_a_profile_is_told_as_json(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = fit([KV], target_bits=(1.2, 2.4))
    monkeypatch.setattr(calibrate, "profile_of", lambda codec, model, say, track, fresh: say("calibrating") or profile)
    assert main(["codec", "calibrate", str(tiny_folder), "--output", str(tmp_path / "p"), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["profile_sha256"], found["file"]) == (profile.sha256, str(tmp_path / "p"))
    assert found["bytes"] == (tmp_path / "p").stat().st_size
    assert said.err == "calibrating\n"


@pytest.mark.parametrize("positions", [512, 4_096])
def test_bench_fits_into_a_models_positions(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context of 4,096 byte tokens leaves a model with as many positions none for a question."""
    model = load_model()
    monkeypatch.setattr(model.network.config, "max_position_embeddings", positions)
    monkeypatch.setattr(calibrate, "distortions", lambda model, codec, *_: [0.0] * len(codec.levels))
    monkeypatch.setattr(bench, "REPEATS", 1)
    rows = bench.measure(model, ["raw"], 256, lambda line: None)
    assert rows[0]["lines"]["right"] == rows[0]["lines"]["asked"] > 0


def test_bench_shows_total_and_payload_rates(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "distortions", lambda model, codec, *_: [0.0] * len(codec.levels))
    monkeypatch.setattr(bench, "calculate_kv", lambda *_: KV.float())
    profile = cachegen.fit([KV])
    monkeypatch.setattr(calibrate, "profile_of", lambda *_: profile)
    rows = bench.measure(tiny_model, ["cachegen", "artifact"], 100, lambda line: None)
    for row in rows:
        # a header and, in artifact, a table of 33 entries a column and a length a column, in each of three chunks
        beside = row["bits_per_element"] - row["payload_bits_per_element"]
        tables = (66 + 4) * 8 / 100 if row["codec"] == "artifact" else 0.0
        assert tables < beside < tables + 0.25
        assert row["profile_bytes"] == (len(profile.to_bytes()) if row["codec"] == "cachegen" else 0)
        assert row["lines"] is row["english"] is None  # random weights answer nothing
    said = bench.text(rows, None)
    assert f"profiles, sent once and not included in rates: cachegen {len(profile.to_bytes()):,} bytes" in said
    assert "the cache is float32" in said


def test_devices_that_are_not_there_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["calibrate", "bundled"], ["bench"]):
        assert main(["codec", *command, "--device", "meta-physical"]) == 4
        assert "torch cannot use it here" in capsys.readouterr().err


def test_a_text_that_is_not_there_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["codec", "bench", "--text", "check-nothing", "--model", "./nowhere"])
    assert "invalid choice: 'check-nothing' (choose from 'check', 'check-prose'" in capsys.readouterr().err
