"""The whole pipeline on one GPU: sender, emulated link, receiver, decoding while bytes arrive, first token.

    scripts/gpu_machine.sh run KIT python benchmarks/pipeline_gpu.py --out benchmarks/results/h200-pipeline.json

A context of 9,490 tokens in 7 chunks in the shape of Mistral-7B's cache goes over a link of the machine's own. Its
bytes are really encoded and decoded; what they encode is synthetic KV with the statistics of the bundled model's
(kvstream.testbed.encoding.lookalike), and the model has random weights (`--model` takes real ones): times, not
answers. A row is the median of several sessions at one rate: TTFT, and what it is at the least, the bytes that
crossed the bottleneck at layer 2 over its capacity, plus the prompt's prefill with nothing beside it. `hidden` is the
part of copying and decoding that was over when the last byte came. `--small` tries the script on a small
model, also without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvstream.codec import registry
from kvstream.codec.profile import Profile
from kvstream.codec.targets import DTYPES
from kvstream.testbed.emulator import sandbox
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.path import open_path
from kvstream.testbed.encoding import lookalike
from kvstream.testbed.engine import random_model
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.host import machine
from kvstream.testbed.host.process import Process
from kvstream.testbed.run.stage import PADDING_BYTES, PORT
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads import synthetic
from kvstream.testbed.workloads.synthetic import decode_bytes_per_s
from kvstream.traces.trace import Trace

PROMPT_TOKENS = 32
KEPT_LEVELS = (2, 3, 4)
"""Of kvstream's ladder: about 0.4, 0.7 and 1.1 bits."""
LEVEL = 1
"""The one measured with, of those: about 0.7 bits, far below the distortion of CacheGen's default."""
EIGHT_BIT = 2
UNSHAPED_BPS = 200e9
"""More than this machine's links can carry."""
KEPT = "kvstream, the session for the picture"
DEADLINE_S = 0.5
SETTLE_S = 0.3
LEAD_S = 0.15
"""From the command to a session's time zero: connections are made and padded in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:mistral-7b", help="folder of real weights, or random:NAME")
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 3, 10, 25], metavar="GBPS")
    parser.add_argument("--sessions", type=int, default=5, help="of each row (default: 5)")
    parser.add_argument(
        "--pages-on", nargs="+", default=[], metavar="DEVICE", help="decode into pages, the layers shared out"
    )
    parser.add_argument("--small", action="store_true", help="a small model and context: does the script run?")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="only draw what --out holds, as pictures")
    arguments = parser.parse_args()
    if arguments.draw:
        found = json.loads(arguments.out.read_text())
        draw_session(found, arguments.draw / "gpu-timeline.png")
        draw_interference(found, arguments.draw / "gpu-interference.png")
        return
    if not sandbox.inside():
        sys.exit(sandbox.run([sys.executable, *sys.argv]))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = Store(folder / "store")
    facts = build(store, arguments)
    found: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "measurement": device == "cuda" and not arguments.small,
        "gpu": torch.cuda.get_device_name(0) if device == "cuda" else None,
        **machine.describe(),
        "contexts": facts,
        "decoding": decoding(store, device),
    }
    print(json.dumps(found["decoding"]), flush=True)
    rates = [rate * 1e9 for rate in arguments.rates]
    model = "bundled" if arguments.small else arguments.model
    with Bench(store, model, device, arguments.pages_on, [*rates, UNSHAPED_BPS], folder) as bench:
        found["model"] = bench.ready
        found["costs"] = bench.costs
        found["shaper"] = bench.path.down.settings
        rows = found["rows"] = []

        def row(name: str, codec: str, policy: str, rate: float, sessions: int, **settings: Any) -> None:
            rows.append(bench.row(name, codec, policy, rate, sessions, **settings))

        fixed = f"fixed,level={LEVEL}"
        for rate in rates:
            row("kvstream", "kvstream", fixed, rate, arguments.sessions)
        row("kvstream, no link to speak of", "kvstream", fixed, UNSHAPED_BPS, arguments.sessions)
        for rate in (rates[-1], UNSHAPED_BPS):
            row("kvstream, two connections", "kvstream", fixed, rate, arguments.sessions, connections=2)
        three = 3e9 if 3e9 in rates else rates[0]
        few = max(1, arguments.sessions // 2)
        row("8 bit", "uniform", f"fixed,level={EIGHT_BIT}", three, few)
        row("text", "kvstream", "text", three, few)
        for rate in (three, UNSHAPED_BPS):  # the second: what the network alone takes of the interpreter
            row("kvstream, decoding after the last byte", "kvstream", fixed, rate, few, overlap=False)
        ten = 10e9 if 10e9 in rates else rates[-1]
        row("kvstream beside a GEMV loop", "kvstream", fixed, ten, arguments.sessions, load=True)
        row(KEPT, "kvstream", fixed, three, 1, keep=True)
    return found


def build(store: Store, arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode the context under both codecs for the model that will receive it."""
    began = time.monotonic()
    bundled = load_model()
    tokens, chunk_tokens = (600, 100) if arguments.small else (synthetic.tokens_of(synthetic.CONTEXT), 1500)
    source = lookalike.source_of(bundled, 8_000 if not arguments.small else 1_000, chunk_tokens, KEPT_LEVELS)
    if arguments.small:
        receiver, shape, vocabulary, theta = bundled.fingerprint, bundled.kv, bundled.vocabulary, 1e5
    elif arguments.model.startswith(random_model.PREFIX):
        name = arguments.model.removeprefix(random_model.PREFIX)
        receiver, shape, vocabulary, theta = random_model.shape_for(name)
    else:
        real = load_model(arguments.model, dtype="bfloat16")
        theta = float(real.network.config.rope_parameters["rope_theta"])
        receiver, shape, vocabulary = real.fingerprint, real.kv, real.vocabulary
    made = lookalike.Lookalike(source, shape, lookalike.rotary(shape.head_dim, theta))
    contexts = lookalike.store_lookalike(
        store, made, tokens=tokens, chunk_tokens=chunk_tokens, codecs=["kvstream", "uniform"], model=receiver,
        vocabulary=vocabulary, prompt_tokens=PROMPT_TOKENS, say=lambda line: print(line, flush=True),
    )  # fmt: skip
    print(f"contexts made in {time.monotonic() - began:.0f} s", flush=True)
    return {name: lookalike.facts(store.manifest(context), source) for name, context in contexts.items()}


def decoding(store: Store, device: str) -> dict[str, Any]:
    """All chunks decoded without a link: the GPU's own time by its profiler, and whether one equals the CPU's."""
    manifest = store.manifest(lookalike.context_of("kvstream"))
    assert manifest.profile is not None
    codec = registry.from_config(manifest.codec, Profile.from_bytes(store.profile(manifest.profile)))
    dtype = DTYPES[manifest.kv.dtype]
    shape = (manifest.kv.layers, 2, manifest.tokens, manifest.kv.heads, manifest.kv.head_dim)
    cache = torch.empty(shape, dtype=dtype, device=device)
    chunks = [bytearray(store.get_kv(f"{manifest.context}/{i}", LEVEL)) for i in range(len(manifest.chunks))]

    def work() -> None:
        for data, info in zip(chunks, manifest.chunks, strict=True):
            codec.decode(data, cache[:, :, info.start : info.stop], device=device)

    work()
    began = time.monotonic()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    found: dict[str, Any] = {"wall_s": time.monotonic() - began}
    last = manifest.chunks[-1]
    exact = codec.decode(chunks[-1])
    assert isinstance(exact, torch.Tensor)
    got, wanted = cache[:, :, last.start :].cpu().float(), exact.float()
    rms = wanted.pow(2).mean(dim=2, keepdim=True).sqrt()
    ulp = torch.finfo(dtype).eps * wanted.abs()
    found["beyond_tolerance"] = int(((got - wanted).abs() > torch.maximum(ulp, rms * 2.0**-14)).sum())
    found["different_elements"] = int((got != wanted).sum())
    found["elements"] = wanted.numel()
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        kernels = [e for e in profile.key_averages() if e.self_device_time_total > 0]
        copies = [e for e in kernels if e.key.startswith(("Memcpy", "Memset"))]
        found["gpu_s"] = sum(e.self_device_time_total for e in kernels if e not in copies) / 1e6
        found["gpu_copy_s"] = sum(e.self_device_time_total for e in copies) / 1e6
        found["kernels"] = {e.key[:60]: [e.count, e.self_device_time_total / 1e6] for e in kernels}
    return found


class Bench:
    """A link, a sender and a receiver, warm."""

    def __init__(
        self, store: Store, model: str, device: str, pages_on: Sequence[str], rates: Sequence[float], folder: Path
    ) -> None:
        self._store, self._model, self._device, self._folder = store, model, device, folder
        self._pages = ["--pages-on", *pages_on] if pages_on else []
        self._traces = {rate: Trace(f"{rate / 1e9:g} Gbit/s", [1.0], [rate]) for rate in rates}
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        with ExitStack() as stack:
            self.path = stack.enter_context(open_path(LinkSettings(), list(self._traces.values())))
            self.network = network = self.path.network
            self._senders = [
                self._start(
                    stack,
                    network.sender,
                    "kvstream.testbed.net.sender",
                    "--host",
                    "0.0.0.0",
                    "--port",
                    str(port),
                    "--sandbox",
                )
                for port in (PORT, PORT + 1)
            ]
            dtype = self._store.manifest(lookalike.context_of("kvstream")).kv.dtype
            self._receiver = self._start(
                stack, network.receiver, "kvstream.testbed.receiver",
                "--model", self._model, "--device", self._device, "--dtype", dtype, *self._pages,
            )  # fmt: skip
            self.ready = self._receiver.await_ready()
            contexts = [lookalike.context_of(codec) for codec in ("kvstream", "uniform")]
            self.costs = self._receiver.ask({"cmd": "prepare", "contexts": contexts}, 300.0)["costs"]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack, host: Any, module: str, *options: str) -> Process:
        process = Process(
            module,
            lambda argv, **settings: self.network.popen(host, argv, **settings),
            ["-m", module, "--store", str(self._store.path), *options],
            self._folder / f"{'-'.join([module, *options[-2:-1]])}.log",
        )
        stack.callback(process.close)
        return process

    def row(
        self, name: str, codec: str, policy: str, rate: float, sessions: int, *, keep: bool = False, **settings: Any
    ) -> dict[str, Any]:
        """Sessions of one kind; medians, and every session's own numbers. One before them is thrown away, but for its
        goodput: that is the prior of the others, as of a receiver that has fetched over its path before."""
        first = self.session(codec, policy, rate, keep=False, **settings)
        given = settings | ({"prior_bps": first["goodput_bps"]} if "goodput_bps" in first else {})
        done = [self.session(codec, policy, rate, keep=keep, **given) for _ in range(sessions)]
        found: dict[str, Any] = {"name": name, "codec": codec, "policy": policy, "rate_bps": rate, **settings}
        good = [session for session in done if "failed" not in session]
        for key in good[0] if good else ():
            values = [session[key] for session in good]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                found[key] = statistics.median(values)
        found["sessions"] = done
        numbers = {key: round(value, 4) for key, value in found.items() if isinstance(value, float)}
        print(f"{name}: {json.dumps(numbers)}", flush=True)
        return found

    def session(
        self, codec: str, policy: str, rate: float, *, keep: bool, connections: int = 1, **settings: Any
    ) -> dict[str, Any]:
        trace = self._traces[rate]
        time.sleep(SETTLE_S)
        zero_s = time.monotonic() + (LEAD_S if not settings.get("load") else 3 * LEAD_S)
        self.path.arm(trace, zero_s, 60.0)
        url, *others = [f"http://{self.network.sender_ip}:{PORT + number}" for number in range(connections)]
        command = {
            "cmd": "session",
            "url": url,
            "others": others,
            "context": lookalike.context_of(codec),
            "policy": policy,
            "deadline_s": DEADLINE_S,
            "start_s": zero_s,
            "padding_bytes": PADDING_BYTES,
            "evaluate": False,
            **settings,
        }
        processes = [*self._senders[:connections], self._receiver]
        before = [cpu_s(process.pid) for process in processes]
        answer = self._receiver.ask(command, 120.0)
        *sent_s, received_s = [cpu_s(process.pid) - start for process, start in zip(processes, before, strict=True)]
        if answer["status"] != "ok":
            self.path.finish()
            return {"failed": answer["error"]}
        record = answer["record"]
        measured = self.path.finish(zero_s + answer["late_s"] + record["ttft_s"])
        verdict = measured.judge(trace)
        costs = self.costs[lookalike.context_of(codec)]
        found = numbers(record, answer, costs["prefill_s"], verdict.delivered_bytes, rate)
        found |= {"sender_thread_s": max(sent_s), "network_thread_s": received_s}
        found |= {"fidelity_ok": verdict.ok, "fidelity": list(verdict.reasons), "starved": verdict.starved}
        found |= {f"gemv_{key}": value for key, value in answer.get("load", {}).items()}
        return found | ({"record": record, "link": measured.down.rows()} if keep else {})


def cpu_s(pid: int) -> float:
    """Seconds that a process's first thread, the one with the network, has run."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def numbers(
    record: dict[str, Any], answer: dict[str, Any], prefill_s: float, bottleneck_bytes: int, rate: float
) -> dict[str, Any]:
    """What a session comes to; times in seconds."""
    chunks = record["chunks"]
    last_byte_s = max(chunk["last_byte_s"] for chunk in chunks)
    first_byte_s = min(chunk["first_byte_s"] for chunk in chunks)
    decoded = [chunk for chunk in chunks if chunk["level"] != "text"]
    pieces = [
        span for chunk in decoded for span in chunk["pieces_s"] or [(chunk["decode_start_s"], chunk["decode_end_s"])]
    ]
    busy_s = sum(end - start for start, end in pieces)
    late_s = sum(end - max(start, last_byte_s) for start, end in pieces if end > last_byte_s)
    ideal_s = bottleneck_bytes * 8 / rate
    return {
        "ttft_s": record["ttft_s"],
        "least_s": ideal_s + prefill_s,
        "ttft_over_least": record["ttft_s"] / (ideal_s + prefill_s),
        "bytes": record["bytes"],
        "bottleneck_bytes": bottleneck_bytes,
        "goodput_bps": record["bytes"] * 8 / (last_byte_s - first_byte_s),
        "rtt_s": answer["rtt_s"],
        "last_byte_s": last_byte_s,
        "after_last_byte_s": answer["prefill_start_s"] - last_byte_s,
        "prefill_s": record["ttft_s"] - answer["prefill_start_s"],
        "decode_lane_s": sum(end - start for start, end in pieces),
        "hidden": 1.0 - late_s / busy_s if busy_s else 1.0,
    }


def draw_session(found: dict[str, Any], path: Path) -> None:
    """The kept session as the report draws it: link, decoding and the model over time."""
    from kvstream.testbed.report.figures import theme
    from kvstream.testbed.report.material import Material
    from kvstream.testbed.report.timeline import timeline

    kept = next(row for row in found["rows"] if row["name"] == KEPT)
    session = kept["sessions"][-1]
    record = session["record"]
    row = {
        "scheme": f"level {LEVEL}",
        "codec": "kvstream",
        "context": f"{found['contexts']['kvstream']['tokens']} tokens",
        "trace": f"{kept['rate_bps'] / 1e9:g} Gbit/s",
        "levels": record["levels"],
        "ttft_s": record["ttft_s"],
        "deadline_s": record["deadline_s"],
    }
    cell = {"row": row, "chunks": record["chunks"], "link": session["link"]}
    with theme():
        figure = timeline(Material({}, {}, {}, {}, simulated=None, problem="", families={}, session=cell))
        assert figure is not None
        figure.savefig(path, dpi=160)


def draw_interference(found: dict[str, Any], path: Path) -> None:
    """How much longer a GEMV loop takes while a stream decodes beside it, against the part of that time that decoding
    takes of the GPU, and would take with CacheGen's public kernels."""
    import matplotlib.pyplot as plt

    from kvstream.testbed.report.figures import theme

    loaded = next(row for row in found["rows"] if row.get("load"))
    context, level = found["contexts"]["kvstream"], list(found["contexts"]["kvstream"]["bytes"])[LEVEL]
    elements = 8 * context["bytes"][level] / context["bits_per_element"][level]
    cachegen_s = 2 * elements / decode_bytes_per_s("cachegen", "h200")
    slowed = [100 * session["gemv_slowdown"] for session in loaded["sessions"]]
    duties = [100 * seconds / loaded["last_byte_s"] for seconds in (found["decoding"]["gpu_s"], cachegen_s)]
    names = ["GEMV loop: slow-down", "kvstream: time decoding", "CacheGen's kernels: time decoding"]
    with theme():
        figure, axes = plt.subplots(figsize=(7.2, 2.2), layout="constrained")
        bars = axes.barh(names, [statistics.median(slowed), *duties], color=["C1", "C0", "0.7"], height=0.6)
        axes.plot(slowed, [0] * len(slowed), "|", color="black", markersize=12)
        for bar, right in zip(bars, (max(slowed), *duties), strict=True):
            axes.annotate(f"{bar.get_width():.1f} %", (right, bar.get_y() + bar.get_height() / 2), (6, 0),
                          textcoords="offset points", va="center")  # fmt: skip
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(f"% of the {1e3 * loaded['last_byte_s']:.0f} ms that a session's bytes take at "
                        f"{loaded['rate_bps'] / 1e9:g} Gbit/s")  # fmt: skip
        figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
