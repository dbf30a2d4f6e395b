"""`kvstream codec ...`: list, encode, decode, inspect, calibrate and measure codecs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstream.testbed.commands.arguments import chosen_profile, output_file, profile_arguments
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.terminal import say

if TYPE_CHECKING:
    from kvstream.testbed.engine.model import Model


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    codec = subparsers.add_parser("codec", help="list, encode, decode, inspect, calibrate and measure codecs")
    commands = codec.add_subparsers(dest="codec_command", metavar="COMMAND", required=True)

    listed = commands.add_parser("list", help="every codec")
    listed.add_argument("--json", action="store_true", help="print as JSON")
    listed.set_defaults(run=list_command)

    encode = commands.add_parser("encode", help="encode one chunk of a context's KV cache into a file")
    encode.add_argument("context", help="name of a shipped context, or a JSON file")
    encode.add_argument("output", type=output_file, help="the file to write")
    _codec_arguments(encode)
    encode.add_argument("--level", type=int, default=0, help="0 is the smallest (default)")
    encode.add_argument("--chunk", type=int, default=0, help="which chunk of the context (default: the first)")
    encode.add_argument("--chunk-tokens", type=int, default=256, help="tokens per chunk (default: 256)")
    encode.set_defaults(run=encode_command)

    decode = commands.add_parser("decode", help="decode a chunk into a safetensors file with the tensor 'kv'")
    decode.add_argument("file", help="an encoded chunk")
    decode.add_argument("output", type=output_file, help="the file to write: kv [layers, 2, tokens, heads, head_dim]")
    _codec_arguments(decode)
    decode.set_defaults(run=decode_command)

    inspect = commands.add_parser("inspect", help="show what an encoded chunk contains, section by section")
    inspect.add_argument("file", help="an encoded chunk")
    inspect.add_argument("--codec", help="the codec that wrote it, with settings (default: as the chunk says)")
    inspect.add_argument("--profile", metavar="FILE", help="the profile it needs (default: looked up by its hash)")
    inspect.add_argument("--json", action="store_true", help="print as JSON")
    inspect.set_defaults(run=inspect_command)

    calibrate = commands.add_parser("calibrate", help="fit a codec's profile to a model")
    calibrate.add_argument("model", help="folder or name of a causal language model, or 'bundled'")
    calibrate.add_argument("--codec", default="kvstream", help="the codec (default: kvstream)")
    calibrate.add_argument("--output", metavar="FILE", type=output_file, help="also write the profile here")
    calibrate.add_argument("--fresh", action="store_true", help="fit again even if there is a profile already")
    _device_argument(calibrate)
    calibrate.add_argument("--json", action="store_true", help="print as JSON")
    calibrate.set_defaults(run=calibrate_command)

    bench = commands.add_parser("bench", help="compare size, distortion and speed of all levels of several codecs")
    bench.add_argument("codecs", nargs="*", default=["kvstream", "cachegen", "artifact", "uniform"])
    bench.add_argument(
        "--model", default="bundled", help="folder or name of a causal language model (default: bundled)"
    )
    bench.add_argument(
        "--text",
        choices=("check", "check-prose", "check-language", "check-random"),
        default="check",
        help="text to measure on: like the calibration's (default), or prose, languages and characters unlike it",
    )
    bench.add_argument("--chunk-tokens", type=int, default=256, help="tokens per chunk (default: 256)")
    _device_argument(bench)
    bench.add_argument("--figure", metavar="FILE", type=output_file, help="draw rate against distortion: SVG, PNG, PDF")
    bench.add_argument("--json", action="store_true", help="print as JSON")
    bench.set_defaults(run=bench_command)

    insight = commands.add_parser("insight", help="the CacheGen paper's three observations, measured on a model")
    insight.add_argument("model", help="folder or name of a causal language model, or 'bundled'")
    insight.add_argument("--figure", metavar="FILE", type=output_file, help="draw them: SVG, PNG or PDF")
    insight.add_argument("--json", action="store_true", help="print as JSON")
    insight.set_defaults(run=insight_command)


def _codec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec", default="kvstream", help="the codec, with settings, or ./mine.py:Class (default: kvstream)"
    )
    parser.add_argument("--model", default="bundled", help="folder or name of the model (default: bundled)")
    profile_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def _device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="device of the model and the codec: cpu (default) or cuda")


def _say(line: str) -> None:
    """Report progress on standard error; standard output is for results."""
    say(line, error=True)


def tried(text: str) -> str:
    """The name of a codec, which is tried first if it is from a file. Raises CodecError or SpecError."""
    from kvstream.testbed.config.build import codec_spec
    from kvstream.testbed.simulator.trial import try_codec

    try_codec(text)
    return codec_spec(text)[0]


def load(name: str, device: str = "cpu") -> Model:
    """A model on a device. Raises SpecError, or MachineError where torch cannot use the device."""
    import torch

    from kvstream.testbed.engine.loading import load_model

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MachineError(f"--device {device}: torch cannot use it here; omit it to use the CPU") from error
    return load_model(None if name == "bundled" else name, device=device)


def list_command(args: argparse.Namespace) -> int:
    import inspect

    from kvstream.codec import registry
    from kvstream.codec.errors import CodecError

    found: list[dict[str, Any]] = []
    for name in registry.names():
        try:
            cls = registry.codec_class(name)
        except CodecError as error:  # a plug-in; the others work
            found.append({"name": name, "problem": str(error)})
            continue
        about = (inspect.getdoc(inspect.getmodule(cls)) or "").split("\n")[0]
        found.append({"name": name, "calibrated": cls.needs_profile, "about": about})
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for row in found:
        if "problem" in row:
            say(f"{row['name']:<10} {'':<11}  does not work: {row['problem']}")
            continue
        say(f"{row['name']:<10} {'calibrated' if row['calibrated'] else '':<11}  {row['about']}")
    return 0


def encode_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.encoding import calibrate, prepare
    from kvstream.testbed.encoding.tokens import context_ids
    from kvstream.testbed.engine.model import calculate_kv
    from kvstream.testbed.store import shift

    tried(args.codec)
    model = load(args.model)
    codec = calibrate.make_codec(args.codec, model, _say, profile=chosen_profile(args), force=args.force)
    (context,) = prepare.find_contexts([args.context])
    tokens = context_ids(model, context)
    start = args.chunk * args.chunk_tokens
    if not 0 <= start < len(tokens):
        raise SpecError(f"chunk {args.chunk} is beyond the {len(tokens)} tokens of {context.name}")
    span = range(start, min(start + args.chunk_tokens, len(tokens)))
    kv = calculate_kv(model, tokens[: span.stop])[:, :, span.start :]
    data = codec.encode(kv, args.level, positions=span)
    args.output.write_bytes(data)
    rate = len(data) * 8 / kv.numel()
    found = codec.shift(data)
    about = shift.of_chunks([found] if found else [])
    facts = {
        **{"file": str(args.output), "context": context.name, "tokens": [span.start, span.stop]},
        **{"codec": args.codec, "level": args.level, "bytes": len(data), "bits_per_element": rate},
        "shift": about and asdict(about),
    }
    words = f"{args.output}: {len(data)} bytes, {rate:.3f} bit/element" + (f"; {about}" if about else "")
    print(json.dumps(facts, indent=1) if args.json else words)
    return 0


def decode_command(args: argparse.Namespace) -> int:
    import torch
    from safetensors.torch import save_file

    from kvstream.testbed.encoding import calibrate

    tried(args.codec)
    model = load(args.model)
    codec = calibrate.make_codec(args.codec, model, _say, profile=chosen_profile(args), force=args.force)
    kv = codec.decode(Path(args.file).read_bytes())
    assert isinstance(kv, torch.Tensor)
    save_file({"kv": kv.contiguous()}, args.output)
    facts = {"file": str(args.output), "shape": list(kv.shape), "dtype": str(kv.dtype).removeprefix("torch.")}
    print(json.dumps(facts, indent=1) if args.json else "{file}: kv {shape} {dtype}".format(**facts))
    return 0


def inspect_command(args: argparse.Namespace) -> int:
    from kvstream.codec import container, registry
    from kvstream.codec.profile import Profile
    from kvstream.testbed.config.build import codec_spec
    from kvstream.testbed.encoding import calibrate

    data = Path(args.file).read_bytes()
    facts = container.inspect(data)
    if args.codec:
        tried(args.codec)
    name, settings = codec_spec(args.codec or facts["codec"])
    needed = facts["profile_sha256"]
    profile = Profile.load(args.profile) if args.profile else needed and calibrate.known_profile(needed)
    if profile is not None or needed is None:
        facts = registry.make(name, settings, profile).describe(data)
    print(json.dumps(facts, indent=1) if args.json else _described(facts))
    if profile is None and needed is not None and not args.json:
        say(f"bits by layer and entropy need profile {needed[:12]}; give it with --profile")
    return 0


def _described(facts: dict[str, Any]) -> str:
    """The facts of a chunk as lines of text."""
    lines = []
    for key, value in facts.items():
        if key == "sections":
            lines += [f"  section {t}: {size} bytes, {size / facts['total_bytes']:.1%}" for t, size in value.items()]
        elif key == "bits_by_layer":
            lines.append("coded symbols, bit per element:")
            lines.append(f"  {'layer':<6} {'keys':>7} {'values':>7}")
            lines += [f"  {layer:<6} {keys:>7.3f} {values:>7.3f}" for layer, (keys, values) in enumerate(value)]
        elif key == "bits_by_group":
            lines.append("coded symbols, bit per element:")
            each, last = facts["group_layers"], facts["shape"][0] - 1
            names = [(first, min(first + each - 1, last)) for first in range(0, last + 1, each)]
            lines += [f"  layers {first}-{end}: {bits:.3f}" for (first, end), bits in zip(names, value, strict=True)]
        elif key == "ideal_bits_per_element":
            over = facts["bits_per_element"] / value - 1
            lines.append(f"entropy of the coder's model: {value:.4f} bit per element; the chunk takes {over:+.1%}")
        else:
            lines.append(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")
    return "\n".join(lines)


def calibrate_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.encoding import calibrate
    from kvstream.testbed.run import progress

    codec = tried(args.codec)
    model = load(args.model, args.device)
    profile = calibrate.profile_of(codec, model, _say, progress.track, fresh=args.fresh)
    data = profile.to_bytes()
    if args.output:
        args.output.write_bytes(data)
    facts = {
        **{"profile_sha256": profile.sha256, "codec": args.codec, "model": model.name, "bytes": len(data)},
        "file": str(args.output) if args.output else None,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    say("profile {profile_sha256} of {codec} for {model}: {bytes} bytes".format(**facts))
    if args.output:
        print(args.output)
    return 0


def bench_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.encoding import bench as codec_bench
    from kvstream.testbed.report import codec_figures
    from kvstream.testbed.run import progress

    if args.figure:
        codec_figures.check_path(args.figure)
    for codec in args.codecs:
        tried(codec)
    model = load(args.model, args.device)
    rows = codec_bench.measure(model, args.codecs, args.chunk_tokens, _say, progress.track, args.text)
    torchac = codec_bench.torchac(model, args.chunk_tokens)
    body = {"levels": rows, "torchac": torchac}
    print(json.dumps(body, indent=1) if args.json else codec_bench.text(rows, torchac))
    if args.figure:
        codec_figures.rate_distortion(rows, args.figure)
    return 0


def insight_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.encoding import insight
    from kvstream.testbed.report import codec_figures
    from kvstream.testbed.run import progress

    if args.figure:
        codec_figures.check_path(args.figure)
    found = insight.measure(load(args.model), progress.track)
    print(json.dumps(found.to_json(), indent=1) if args.json else insight.text(found))
    if args.figure:
        codec_figures.insight(found, args.figure)
    return 0
