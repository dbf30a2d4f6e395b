from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from policies.api import Choice, InFlight, Observation, Transfer
from policies.errors import PolicyError
from testbed import guard
from testbed.errors import SpecError
from testbed.lab import check, cli, explain, grade, remote, situation, submission, worker
from testbed.lab.start import FILES, start
from testbed.lab.timeline import WIDTH, session_line
from traces.errors import TraceError

EXAMPLES = FILES / "examples"
HEAD = "from kvstream import Choice, Replace\nclass P:\n"


@pytest.fixture(scope="module")
def lab() -> situation.Situation:
    return situation.load()


def write(folder: Path, body: str) -> str:
    """A policy file with this class body; returns its spec."""
    file = folder / "mine.py"
    file.write_text(HEAD + body)
    return f"{file}:P"


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    args = parser.parse_args(["lab", *map(str, words)])
    status = args.run(args)
    assert isinstance(status, int)
    return status


# --- the situation


def test_levels_matter_on_every_link(lab: situation.Situation) -> None:
    """The lowest level must not be the best that can be had, the highest must be too slow, somewhere."""
    plans = [lab.best(trace) for trace in situation.teaching_traces()]
    assert all(plan is not None for plan in plans)
    assert all(plan.distortion < 0.8 * lab.worst for plan in plans if plan is not None)
    highest = [lab.run(submission.make("highest"), trace) for trace in situation.teaching_traces()]
    assert not all(record is not None and record.met for record in highest)


def test_the_oracle_that_is_shown_meets_every_deadline_and_beats_no_bound() -> None:
    for one in check.check("lowest"):
        assert one.plan is not None
        assert one.oracle is not None
        assert one.oracle.met
        assert one.oracle.distortion >= one.plan.distortion - 1e-12
        assert one.oracle.distortion < 0.01 * situation.load().worst


# --- the student's file


def test_start_writes_a_file_of_at_most_60_lines_that_works_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path)
    assert len((tmp_path / "policy.py").read_text().splitlines()) <= submission.MOST_LINES
    monkeypatch.chdir(tmp_path)
    assert run("check") == 0
    assert "Deadlines met: " in capsys.readouterr().out
    with pytest.raises(SpecError, match=r"policy\.py is there already"):
        start(tmp_path)


def test_the_template_is_fully_typed_and_needs_only_kvstream() -> None:
    for file in FILES.rglob("*.py"):
        tree = ast.parse(file.read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert imported <= {"__future__", "dataclasses", "kvstream"}
        [choose] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert choose.returns is not None
        assert all(argument.annotation is not None for argument in choose.args.args[1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\n", "no class with a method choose"),
        ("def choose(obs:\n", "is not Python"),
        (HEAD + "  def choose(self, obs): ...\nclass Q:\n  def choose(self, obs): ...\n", "say which, as in .*:Q"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "policy.py"
    file.write_text(content)
    with pytest.raises(PolicyError, match=message):
        submission.spec_of(str(file))


def test_a_missing_file_names_the_way_to_begin(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="kvstream lab start DIR"):
        submission.spec_of(str(tmp_path / "policy.py"))


def test_settings_are_passed_on(tmp_path: Path) -> None:
    assert submission.spec_of(f"{EXAMPLES / 'fixed.py'},level=2") == f"{EXAMPLES / 'fixed.py'}:MyPolicy,level=2"
    assert submission.make(f"{EXAMPLES / 'fixed.py'}:MyPolicy,level=2").level == 2  # type: ignore[attr-defined]


def test_the_future_is_not_for_sale() -> None:
    with pytest.raises(SpecError, match="told the future"):
        submission.make("oracle")


# --- check


def test_a_fault_becomes_level_0_and_its_traceback_is_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "  def choose(self, obs):\n    return Choice(1 // (obs.chunk - 3))\n")
    assert run("check", tmp_path / "mine.py") == 0
    out = capsys.readouterr().out
    assert out.count("ZeroDivisionError") == 1
    assert "replaced by level 0" in out


@pytest.mark.parametrize("hook", ["choose", "progress"])
def test_an_endless_loop_ends_the_session_of_its_policy_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hook: str
) -> None:
    monkeypatch.setattr(guard, "PATIENCE_S", 0.1)
    loop = "    while obs.chunk > 2: pass\n"
    body = "  def choose(self, obs):\n" + (loop if hook == "choose" else "") + "    return Choice(1)\n"
    if hook == "progress":
        body += "  def progress(self, obs):\n" + loop
    write(tmp_path, body)
    assert run("check", tmp_path / "mine.py") == 0
    out = capsys.readouterr().out
    assert "no answer within 100 ms" in out
    assert "Traceback" not in out
    assert run("explain", "cliff", 5, tmp_path / "mine.py") == 0
    assert "You took level 0" in capsys.readouterr().out


def test_check_is_one_screen_and_quick() -> None:
    """A process of its own, as a student starts it: imports count. Processor time, so that a busy machine does not."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", "from tests.testbed.test_lab import run; run('check', 'buffer-based')"],
        capture_output=True,
        text=True,
        check=True,
    )
    after = os.times()
    assert len(done.stdout.splitlines()) <= 40
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "\x1b" not in done.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5


def test_the_lab_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from tests.testbed.test_lab import run; run('check', 'throughput')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_timeline_begins_chunks_with_their_level_and_marks_the_deadline(lab: situation.Situation) -> None:
    record = lab.run(submission.make("lowest"), situation.teaching_traces()[0])
    line = session_line(record, lab.n_levels, lab.deadline_s).plain
    assert len(line) == WIDTH + 1
    assert line.count("│") == 1
    assert set(line) <= set("0─·=* │>")
    assert 8 <= line.count("0") <= 16
    assert session_line(None, lab.n_levels, lab.deadline_s).plain.startswith("the link carried nothing")


# --- explain


def test_explaining_the_oracles_choice_and_a_worse_one(lab: situation.Situation) -> None:
    found = explain.explain("lowest", "cliff", 2, lab)
    assert found.asked.level == 0
    assert [one.level for one in found.outcomes] == [*range(lab.n_levels), "text"]
    assert found.best.distortion is not None
    assert found.chosen.distortion is not None
    assert found.best.distortion <= found.chosen.distortion
    words = explain.text(found, lab)
    assert "<- you" in words
    assert "<- the oracle" in words or "<- you and the oracle" in words


def test_the_first_choices_best_outcome_is_the_oracles_plan(lab: situation.Situation) -> None:
    """Two ways to one number: the plan of the whole session, and the best that is left at the first choice."""
    for trace in situation.teaching_traces():
        plan = lab.best(trace)
        found = explain.explain("lowest", trace.name, 0, lab)
        assert plan is not None
        assert found.best.distortion == pytest.approx(plan.distortion, abs=1e-9)


def test_following_the_outcomes_reaches_them(lab: situation.Situation) -> None:
    """A policy that always takes the best outcome ends with the distortion foretold at its first choice."""
    trace = situation.teaching_traces()[1]
    foretold: list[float] = []

    class Follow:
        def choose(self, obs: Observation) -> Choice:
            best = min(
                explain.outcomes(lab, trace, obs),
                key=lambda one: (one.distortion is None, one.distortion or 0, one.earliest_s),
            )
            foretold.append(best.distortion if best.distortion is not None else 9.0)
            return Choice(best.level)

    record = lab.run(Follow(), trace)
    assert record is not None
    assert record.met
    assert record.distortion == pytest.approx(foretold[0], abs=0.02 * lab.worst)


def test_unknown_links_and_chunks_are_named(lab: situation.Situation) -> None:
    with pytest.raises(TraceError, match="in the lab: steady, cliff"):
        explain.explain("lowest", "nosuch", 0, lab)
    with pytest.raises(SpecError, match="chunks 0 to"):
        explain.explain("lowest", "cliff", 99, lab)


def test_reasons_carry_units() -> None:
    assert explain.reason_words("rate_bps", 34.43e6) == "rate 34.4 Mbit/s"
    assert explain.reason_words("buffer_s", 0.1) == "buffer 0.1 s"


# --- grade


def test_an_observation_survives_the_pipe(lab: situation.Situation) -> None:
    watch = submission.Watch()
    lab.run(submission.make("throughput"), situation.teaching_traces()[0], ask=watch)
    obs = watch.asked[7].observation
    assert obs.transfers
    assert obs.in_flight
    assert isinstance(obs.transfers[0], Transfer)
    assert isinstance(obs.in_flight[0], InFlight)
    assert worker.observation_from_json(json.loads(json.dumps(worker.observation_to_json(obs)))) == obs


def test_a_policy_does_the_same_here_and_in_the_worker(lab: situation.Situation) -> None:
    spec = submission.spec_of(str(EXAMPLES / "throughput.py"))
    with remote.RemotePolicies(spec) as there:
        for trace in situation.teaching_traces()[:2]:
            assert lab.run(there.fresh(), trace) == lab.run(submission.make(spec), trace)


def test_grading_better_and_worse_policies(lab: situation.Situation) -> None:
    peer = grade.grade(check.PEER, "secret", links_each=2, situation=lab)
    assert (peer["gain"], peer["score"]) == (0, peer["buffer_based_score"])
    assert [peer[f"{what}_difference{end}"] for what in ("violations", "regret") for end in ("", "_low", "_high")] == [
        0
    ] * 6
    assert "difference +0.0 points [95 % interval +0.0 to +0.0], McNemar p = 1" in grade.text(peer)
    worst = grade.grade("text", "secret", links_each=2, situation=lab)
    assert worst["score"] < peer["score"]
    assert worst["gain_high"] < 0
    assert (
        0 < worst["violations_difference_low"] <= worst["violations_difference"] <= worst["violations_difference_high"]
    )
    assert worst["violations_difference"] == pytest.approx(worst["violations"] - worst["violations_buffer_based"])


def test_regret_is_compared_where_both_met_the_deadline(lab: situation.Situation) -> None:
    found = grade.grade("lowest", "secret", links_each=2, situation=lab)
    assert 0 < found["regret_difference_n"] <= found["sessions"]
    assert 0 < found["regret_difference_low"] <= found["regret_difference"] <= found["regret_difference_high"]
    assert f"over the {found['regret_difference_n']} sessions that both met" in grade.text(found)


def test_the_seed_decides_the_links_and_is_needed_to_know_them() -> None:
    one, same, other = grade.held_out("a", 2), grade.held_out("a", 2), grade.held_out("b", 2)
    assert [trace.sha256 for trace in one] == [trace.sha256 for trace in same]
    assert {trace.sha256 for trace in one}.isdisjoint(trace.sha256 for trace in other)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("  def choose(self, obs):\n    while True: pass\n", "no answer within"),
        ("  def choose(self, obs):\n    import os; os._exit(3)\n", "the process ended"),
        ("  def choose(self, obs):\n    return bytearray(4 << 30)\n", "MemoryError"),
        ("  def choose(self, obs):\n    return 'best'\n", "choose answered 'best'"),
        ("  def choose(self, obs):\n    raise KeyError('oops')\n", "KeyError: 'oops'"),
        ("  def choose(self, obs):\n    print('chatter', flush=True); return Choice(99)\n", "level 99 was chosen"),
    ],
)
def test_whatever_a_submission_does_the_session_goes_on_at_level_0(
    tmp_path: Path, lab: situation.Situation, body: str, why: str
) -> None:
    with remote.RemotePolicies(write(tmp_path, body)) as there:
        record = lab.run(there.fresh(), situation.teaching_traces()[0])
        assert record is not None
        assert set(record.levels) == {0}
        assert record.policy_faults == len(record.levels)
        assert why in (record.chunks[0].fault or "")


def test_a_file_that_cannot_be_imported_stops_the_grading(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="RuntimeError: at import"):
        grade.grade(write(tmp_path, "  raise RuntimeError('at import')\n  def choose(self, obs): ...\n"))


def test_progress_hooks_cross_the_pipe(tmp_path: Path, lab: situation.Situation) -> None:
    body = (
        "  def choose(self, obs):\n    return Choice(obs.n_levels - 1)\n"
        "  def progress(self, obs):\n"
        "    one = obs.in_flight[0]\n"
        "    return Replace(0) if obs.now_s > 0.4 and one.level != 0 else 'keep'\n"
    )
    spec = write(tmp_path, body)
    with remote.RemotePolicies(spec) as there:
        far = lab.run(there.fresh(), situation.teaching_traces()[1])
    near = lab.run(submission.make(spec), situation.teaching_traces()[1])
    assert far is not None
    assert near is not None
    assert far.levels == near.levels
    assert 0 in far.levels


def test_results_go_to_autograders_and_the_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, file in (("ada", "throughput"), ("bob", "fixed")):
        out, scope = tmp_path / f"{name}.json", tmp_path / f"{name}-scope.json"
        assert run("grade", EXAMPLES / f"{file}.py", "--name", name, "--output", out, "--gradescope", scope) == 0
        given = json.loads(scope.read_text())
        assert 0 <= given["score"] <= 100
        assert given["leaderboard"][0]["name"] == "score"
    capsys.readouterr()
    assert run("leaderboard", tmp_path / "ada.json", tmp_path / "bob.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    scores = [float(line.split()[2]) for line in lines[1:]]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(SpecError, match="not a result"):
        run("leaderboard", tmp_path / "ada-scope.json")
    result = json.loads((tmp_path / "ada.json").read_text())
    (tmp_path / "eve.json").write_text(json.dumps(result | {"score": "100"}))
    with pytest.raises(SpecError, match=r"eve\.json: not a result .*score is '100'; give a number"):
        run("leaderboard", tmp_path / "eve.json")
