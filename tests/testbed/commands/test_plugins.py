"""Policies and codecs of other people: from files and by entry point, working and broken."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch, from the extra [run]")

from kvstream.codec import registry as codecs
from kvstream.policies import registry as policies
from kvstream.testbed.cli import main
from kvstream.testbed.config.build import codec_spec
from kvstream.testbed.encoding.prepare import Prepared
from kvstream.testbed.run import check_inputs
from tests.testbed.commands.test_serving import serving

EXAMPLE = Path(__file__).parents[3] / "examples" / "my_codec.py"
ZIP = "./my_codec.py:Zip"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE, tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    return said.err


def test_a_codec_from_a_file_in_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    call = ("simulate", "--quick", "--policy", "fixed,level=lowest", "--trace", "steady", "--json", "--codec", ZIP)
    assert main(call) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["schemes"][0]["codec"] == ZIP
    assert 0 < summary["schemes"][0]["distortion"] < 0.2
    manifest = json.loads(Path("runs/main-custom-quick/manifest.json").read_text())
    assert list(manifest["files"]) == ["./my_codec.py"]
    assert [level["name"] for level in manifest["levels"][ZIP]] == ["12-bit", "whole"]


def test_a_codec_from_a_file_for_a_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("codec", "encode", "docs", "chunk", "--codec", ZIP, "--level", "1")) == 0
    capsys.readouterr()
    assert main(("codec", "inspect", "chunk", "--codec", ZIP, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["codec"] == "zip"
    assert main(("codec", "decode", "chunk", "kv.safetensors", "--codec", ZIP)) == 0


def test_a_stored_context_is_fetched_with_the_file_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("store", "docs", "--codec", ZIP, "--to", "contexts")) == 0
    with serving("contexts") as lines:
        url = lines[0].split()[-1]
        call = ("fetch", url, "docs", "--output", "kv.safetensors", "--policy", "highest", "--deadline", "30s")
        codecs._FROM_FILES.clear()  # as in another process
        capsys.readouterr()
        assert "unknown codec 'zip'" in refused(capsys, *call)
        assert main((*call, "--codec", ZIP)) == 0


def test_another_version_of_the_file_is_another_codec(here: Path) -> None:
    """Or a store and distortions of the earlier one would be taken for its."""
    name, settings = codec_spec(ZIP)
    before, version = codecs.identity(codecs.make(name, settings)), codecs.version(name)
    file = here / "my_codec.py"
    file.write_text(file.read_text().replace("~0xF", "~0x3"))
    assert codec_spec(ZIP) == (name, settings)
    assert codecs.identity(codecs.make(name, settings)) != before
    assert codecs.version(name) != version
    assert codecs.version("uniform") == ""


def test_receivers_are_given_the_file() -> None:
    prepared = Prepared(Path("store"), "bundled", "made", {("docs", ZIP): "a", ("docs", "uniform"): "b"}, {}, {})
    assert prepared.receiver_arguments == ["--model", "bundled", "--codec", ZIP]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class Zip: pass\n", "is not a subclass of kvstream.Codec"),
        ("raise ValueError('no')\n", "cannot be imported: ValueError: no"),
        ("import os\nos._exit(3)\n", "ends its process (status 3) before its first chunk"),
        ("from kvstream import Codec\nclass Other(Codec): pass\n", "has no class 'Zip'; it has Codec, Other"),
        (
            "from kvstream import Codec\nclass Zip(Codec):\n    codec_id = 'kvstream'\n",
            "'kvstream' is taken by a codec",
        ),
        ("from kvstream import Codec\nclass Zip(Codec): pass\n", "Zip has no codec_id"),
    ],
)
def test_what_is_wrong_with_a_file(capsys: pytest.CaptureFixture[str], here: Path, text: str, says: str) -> None:
    (here / "my_codec.py").write_text(text)
    assert says in refused(capsys, "simulate", "--quick", "--policy", "mpc", "--codec", ZIP)


def test_two_files_with_one_id(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    shutil.copy(EXAMPLE, here / "other.py")
    codec_spec(ZIP)
    said = refused(capsys, "codec", "bench", ZIP, "./other.py:Zip")
    assert "the codec_id 'zip' is that of" in said


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "codec file ./none.py does not exist" in refused(capsys, "codec", "bench", "./none.py:Zip")


def test_a_manifest_cannot_name_a_file() -> None:
    """What a sender says is untrusted: it must not make a receiver run a file."""
    with pytest.raises(codecs.CodecError, match="unknown codec"):
        codecs.from_config({"codec": ZIP, "settings": {}, "profile_sha256": None})


def test_broken_plug_ins_are_named_beside_those_that_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for registry, command in ((policies, "policy"), (codecs, "codec")):
        broken = EntryPoint("broken", "no_such_package:Thing", registry.ENTRY_POINT_GROUP)
        monkeypatch.setattr(registry, "_plug_ins", lambda broken=broken: {"broken": broken})
        assert main((command, "list")) == 0
        said = capsys.readouterr().out
        assert "kvstream" in said
        assert f"does not work: {command} plug-in 'broken' (no_such_package:Thing) cannot be imported" in said
        assert main((command, "list", "--json")) == 0
        entry = next(one for one in json.loads(capsys.readouterr().out) if one["name"] == "broken")
        assert "No module named 'no_such_package'" in entry["problem"]


def test_files_of_codecs_belong_to_a_run() -> None:
    from kvstream.testbed.config.experiment import from_dict

    made = from_dict({"name": "x", "contexts": ["docs"], "traces": ["steady"], "deadlines_s": [1.0],
                      "schemes": [{"policy": "mpc", "codec": ZIP}]})  # fmt: skip
    assert list(check_inputs.files(made)) == ["./my_codec.py"]
