from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvstream.policies.api import Choice, InFlight, Observation, Transfer
from kvstream.policies.errors import PolicyError
from kvstream.testbed.commands import lab as cli
from kvstream.testbed.errors import SpecError
from kvstream.testbed.lab import check, explain, grade, leaderboard, remote, sessions, situation, submission, worker
from kvstream.testbed.lab.start import FILES, start
from kvstream.testbed.lab.timeline import WIDTH, session_line
from kvstream.testbed.session import ask
from kvstream.traces.errors import TraceError

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
    assert len((tmp_path / "policy.py").read_text().splitlines()) <= submission.MAX_LINES
    monkeypatch.chdir(tmp_path)
    assert run("check") == 0
    assert "Deadlines met: " in capsys.readouterr().out
    with pytest.raises(SpecError, match=r"policy\.py already exists"):
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
        ("def choose(obs:\n", "is not valid Python"),
        (HEAD + "  def choose(self, obs): ...\nclass Q:\n  def choose(self, obs): ...\n", "say which, as in .*:Q"),
    ],
)
def test_an_unusable_file_is_reported_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "policy.py"
    file.write_text(content)
    with pytest.raises(PolicyError, match=message):
        submission.spec_of(str(file))


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="kvstream lab start DIR"):
        submission.spec_of(str(tmp_path / "policy.py"))


def test_settings_are_passed_on(tmp_path: Path) -> None:
    assert submission.spec_of(f"{EXAMPLES / 'fixed.py'},level=2") == f"{EXAMPLES / 'fixed.py'}:MyPolicy,level=2"
    assert submission.make(f"{EXAMPLES / 'fixed.py'}:MyPolicy,level=2").level == 2  # type: ignore[attr-defined]


def test_clairvoyant_policies_are_refused() -> None:
    with pytest.raises(SpecError, match="is clairvoyant"):
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
    monkeypatch.setattr(ask, "PATIENCE_S", 0.1)
    loop = "    while obs.chunk > 2: pass\n"
    body = "  def choose(self, obs):\n" + (loop if hook == "choose" else "") + "    return Choice(1)\n"
    body += "  def progress(self, obs):\n" + loop if hook == "progress" else ""
    write(tmp_path, body)
    assert run("check", tmp_path / "mine.py") == 0
    out = capsys.readouterr().out
    assert "no answer within 100 ms" in out
    assert "Traceback" not in out
    assert run("explain", "cliff", 5, tmp_path / "mine.py") == 0
    assert "You took level 0" in capsys.readouterr().out


def test_what_is_wrong_with_a_policy_is_read_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "  def choose(self, obs):\n    return Choice(1 // (obs.chunk - 3))\n")
    assert run("check", tmp_path / "mine.py") == 0
    out = capsys.readouterr().out
    assert out.index("ZeroDivisionError") < out.index("first token")
    assert run("grade", tmp_path / "mine.py") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("Traceback (most recent call last):")


def test_a_slow_choice_is_told_by_what_it_takes_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = "    end = time.thread_time() + 0.06\n    while obs.chunk == 5 and time.thread_time() < end: pass\n"
    (tmp_path / "mine.py").write_text(f"import time\n{HEAD}  def choose(self, obs):\n{slow}    return Choice(1)\n")
    assert run("check", tmp_path / "mine.py") == 0
    assert "the limit over a real link is 50 ms" in capsys.readouterr().out.splitlines()[0]


def test_check_says_which_exercises_are_passed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "fixed,level=3") == 0
    out = capsys.readouterr().out
    assert "Exercise 1 (steady): passed" in out
    assert "Exercise 2 (the first choice): passed" in out
    assert run("check", EXAMPLES / "buffer.py") == 0
    assert "Exercise 2 (the first choice): FAILED, gives away 6.2 %" in capsys.readouterr().out


def test_check_is_one_screen() -> None:
    """A process of its own, as a student starts it. `benchmarks/commands.py` says how long it takes."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.testbed.lab.test_lab import run; run('check', 'buffer-based')"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) <= 40
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "\x1b" not in done.stdout


def test_the_lab_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from tests.testbed.lab.test_lab import run; sys.exit(run('check', 'mpc'))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mpc" in done.stdout


def test_the_timeline_begins_chunks_with_their_level_and_marks_the_deadline(lab: situation.Situation) -> None:
    record = lab.run(submission.make("lowest"), situation.teaching_traces()[0])
    line = session_line(record, lab.n_levels, lab.deadline_s).plain
    assert len(line) == WIDTH + 1
    assert line.count("│") == 1
    assert set(line) <= set("0─·=* │>")
    assert 8 <= line.count("0") <= 16
    assert session_line(None, lab.n_levels, lab.deadline_s).plain.startswith("the link stopped")


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


def test_the_best_outcome_of_the_first_choice_is_the_oracles_plan(lab: situation.Situation) -> None:
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
    peer = grade.grade(sessions.PEER, "secret", links_each=2, situation=lab)
    assert (peer["gain"], peer["score"]) == (0, peer["buffer_based_score"])
    assert [peer["violations_difference"], peer["regret_difference"]] == [0, 0]
    # no difference in a few sessions does not rule a small one out
    assert -0.2 < peer["violations_difference_low"] == -peer["violations_difference_high"]
    assert [peer["regret_difference_low"], peer["regret_difference_high"]] == [0, 0]
    assert "difference +0.0 points [95 % interval -14.0 to +14.0], McNemar p = 1" in grade.text(peer)
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


_WRITES = """  def choose(self, obs):
    import os
    for descriptor in range(3, 20):
      try: os.write(descriptor, {} + bytes([10]))
      except OSError: pass
    return Choice(0)
"""


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("  def choose(self, obs):\n    while True: pass\n", "no answer within"),
        ("  def choose(self, obs):\n    import os; os._exit(3)\n", "the process ended"),
        ("  def choose(self, obs):\n    return bytearray(4 << 30)\n", "MemoryError"),
        ("  def choose(self, obs):\n    return 'best'\n", "choose answered 'best'"),
        ("  def choose(self, obs):\n    raise KeyError('oops')\n", "KeyError: 'oops'"),
        ("  def choose(self, obs):\n    print('chatter', flush=True); return Choice(99)\n", "level 99 was chosen"),
        (_WRITES.format("b'[' * 2000"), "something else than an answer"),
        (_WRITES.format("b'no JSON'"), "something else than an answer"),
    ],
)
def test_after_any_fault_of_a_submission_the_session_continues_at_level_0(
    tmp_path: Path, lab: situation.Situation, body: str, why: str
) -> None:
    with remote.RemotePolicies(write(tmp_path, body)) as there:
        record = lab.run(there.fresh(), situation.teaching_traces()[0])
        assert record is not None
        assert set(record.levels) == {0}
        assert record.policy_faults == len(record.levels)
        assert why in (record.chunks[0].fault or "")


def test_a_busy_grader_is_not_the_policy_s_fault(tmp_path: Path, lab: situation.Situation) -> None:
    """A choice that waits 0.3 s and computes nothing: longer than the limit, which is one of processor time."""
    body = "  def choose(self, obs):\n    import time\n    if obs.chunk == 3: time.sleep(0.3)\n    return Choice(1)\n"
    with remote.RemotePolicies(write(tmp_path, body)) as there:
        record = lab.run(there.fresh(), situation.teaching_traces()[0])
    assert record is not None
    assert (set(record.levels), record.policy_faults) == ({1}, 0)


def test_a_choice_that_waits_for_ever_ends_all_the_same(
    tmp_path: Path, lab: situation.Situation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WAIT_S", 0.3)
    body = "  def choose(self, obs):\n    import time; time.sleep(60)\n"
    with remote.RemotePolicies(write(tmp_path, body)) as there:
        record = lab.run(there.fresh(), situation.teaching_traces()[0])
    assert record is not None
    assert "of waiting" in (record.chunks[0].fault or "")


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
        assert [one["name"].partition(":")[0] for one in given["tests"]] == [
            f"Exercise {n}" for n in (1, 2, 3, 4, 5, 7, 9)
        ]
        assert {one["status"] for one in given["tests"]} <= {"passed", "failed"}
    capsys.readouterr()
    assert run("leaderboard", tmp_path / "ada.json", tmp_path / "bob.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    scores = [float(line.split()[2]) for line in lines[1:]]
    assert scores == sorted(scores, reverse=True)
    assert run("leaderboard", tmp_path / "ada.json", tmp_path / "bob.json", "--figure", tmp_path / "class.svg") == 0
    drawn = (tmp_path / "class.svg").read_text()
    assert all(f">{name}<" in drawn for name in ("ada", "bob", "buffer-based"))
    with pytest.raises(SpecError, match=r"ends in \.svg or \.png"):
        run("leaderboard", tmp_path / "ada.json", "--figure", tmp_path / "class.txt")
    with pytest.raises(SpecError, match="not a result"):
        run("leaderboard", tmp_path / "ada-scope.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(SpecError, match=r"deep\.json: not a result"):
        run("leaderboard", tmp_path / "deep.json")
    result = json.loads((tmp_path / "ada.json").read_text())
    (tmp_path / "eve.json").write_text(json.dumps(result | {"score": "100"}))
    with pytest.raises(SpecError, match=r"eve\.json: not a result .*score is '100'; give a number"):
        run("leaderboard", tmp_path / "eve.json")


def graded(name: str, violations: float, distortion: float | None, **other: object) -> dict[str, object]:
    return {
        "name": name, "score": 50.0, "sessions": 72, "practice": False, "links": "ab", "violations": violations,
        "violations_buffer_based": 0.1, "distortion": distortion, "distortion_buffer_based": 0.01, "gain": 0.0,
        "gain_low": None, "gain_high": None,
    } | other  # fmt: skip


def test_results_of_different_seeds_are_not_ranked_together(tmp_path: Path) -> None:
    for name, links in (("ada", "ab"), ("bob", "cd")):
        (tmp_path / f"{name}.json").write_text(json.dumps(graded(name, 0.1, 0.01, links=links)))
    with pytest.raises(SpecError, match=r"bob\.json was graded with another seed than .*ada\.json"):
        leaderboard.board([tmp_path / "ada.json", tmp_path / "bob.json"])
    one, other = (grade.grade("lowest", seed, links_each=1)["links"] for seed in ("a", "b"))
    assert one != other
    assert grade.grade("fixed,level=1", "a", links_each=1)["links"] == one


def test_the_hull_has_those_that_are_best_at_some_price_of_a_violation() -> None:
    class_ = [
        graded("safe", 0.0, 0.04), graded("middle", 0.1, 0.01), graded("above", 0.05, 0.03), graded("bold", 0.4, 0.001),
        graded("worse", 0.5, 0.002), graded("equal", 0.1, 0.02), graded("failed", 1.0, None),
    ]  # fmt: skip
    assert [one["name"] for one in leaderboard.hull(class_)] == ["safe", "middle", "bold"]
    assert leaderboard.hull([]) == []


def test_the_table_marks_the_hull(tmp_path: Path) -> None:
    for one in (graded("ada", 0.1, 0.01, score=70.0), graded("bob", 0.2, 0.02, score=80.0)):
        (tmp_path / f"{one['name']}.json").write_text(json.dumps(one))
    board = leaderboard.board(sorted(tmp_path.glob("*.json")))
    assert [(one["name"], one["hull"]) for one in board] == [("bob", False), ("ada", True)]
    first, second = leaderboard.text(board).splitlines()[1:]
    assert second.endswith("0.01  yes")
    assert not first.endswith("yes")
