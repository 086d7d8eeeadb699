"""--replay and --offline: recorded answers, taken where model, sampling, prompt and participant are the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import pytest
from conftest import one_line, until

LLM = ("--agent-type", "llm", "--seed", "7", "--ratio", "2/3")
STEPS = "aloud:\n  system: From 0 to {max_value}.\n  instruction: Think.\n  reasoning_tokens: 16\n"


@pytest.fixture
def recorded(cluster, fake):
    """Play two rounds with 120 participants. Return the folder of the run; no requests are counted yet."""

    def play(*flags, status=0):
        summary = cluster.play("3", "120", *LLM, "--rounds", "2", *flags, status=status)
        fake.bodies.clear()
        return f"runs/{summary['run_id']}"

    return play


def costs(plan):
    """Return the requests, prompt tokens and answer tokens that a plan states, by round."""
    rows = re.findall(r"^ *(\d+|in all) +([\d,]+) +([\d,]+) +([\d,]+)$", plan, re.MULTILINE)
    return {name: [int(cost.replace(",", "")) for cost in row] for name, *row in rows}


def usage(summary):
    return summary["llm"]["replayed"], summary["llm"]["completion_tokens"] > 0


def test_only_new_rounds_cost_requests(cluster, fake, recorded):
    run = recorded()
    values = cluster.values()
    done = cluster.run("run_simulation.sh", "3", "120", *LLM, "--rounds", "3", "--replay", run)
    assert done.returncode == 0 and "120 recorded answers, 0 requests" in done.stderr, done.stderr
    summary = cluster.summary()
    assert summary["llm"]["replayed"] == 240 and cluster.values()[:240] == values
    samples = sum(body.get("n", 1) for body in fake.bodies)
    assert samples == 120 and all("Round 3" in body["messages"][1]["content"] for body in fake.bodies)
    assert "replayed" not in json.loads((cluster.path / run / "summary.json").read_text())["llm"]


@pytest.mark.parametrize("change", ["temperature", "prompt", "structured", "model", "range"])
def test_other_models_prompts_and_settings_take_nothing(cluster, fake, recorded, tmp_path, change):
    run = recorded()
    entry = json.loads((cluster.path / "configs/model_configs.json").read_text())[0]
    if change == "temperature":
        entry["generate_args"] = {"temperature": 0.5}
    if change == "model":
        entry["model_name"] = fake.model = "another-model"
    (tmp_path / "models.json").write_text(json.dumps([entry]))
    (tmp_path / "prompts.yaml").write_text("mine:\n  system: Another text.\n  instruction: Now.\n")
    flags = {
        "prompt": ("--prompts-file", str(tmp_path / "prompts.yaml"), "--prompt", "mine"),
        "structured": ("--structured-output", "response_format"),
        "range": ("--max-value", "200"),
    }.get(change, ("--model-configs", str(tmp_path / "models.json")))
    if change == "model":  # the cluster's servers know the other one
        done = cluster.run("run_simulation.sh", "3", "120", *LLM, *flags, "--replay", run, "--dry-run")
        assert done.returncode == 0 and "its models had other settings, so no answer is taken from it" in done.stderr
        return
    summary = cluster.play("3", "120", *LLM, *flags, "--replay", run)
    assert summary["llm"]["replayed"] == 0 and sum(body.get("n", 1) for body in fake.bodies) == 120


def test_personas_take_the_answers_of_the_same_participants(cluster, fake, recorded):
    run = recorded("--personas", "education")
    values = cluster.values()
    assert (
        cluster.play("3", "120", *LLM, "--rounds", "2", "--personas", "education", "--replay", run)["llm"]["replayed"]
        == 240
    )
    assert cluster.values() == values and not fake.bodies
    flags = ("--agent-type", "llm", "--seed", "8", "--ratio", "2/3", "--personas", "education", "--replay", run)
    summary = cluster.play("3", "120", *flags)  # only some participants have the same persona with another seed
    assert 0 < summary["llm"]["replayed"] < 120


def test_only_answers_of_the_same_seed_let_a_game_claim_to_repeat(cluster, fake, recorded):
    run = recorded()  # without seeds
    fake.repeatable = True
    assert cluster.play("3", "120", *LLM, "--replay", run)["repeatable"] is False
    seeded = recorded()
    assert cluster.play("3", "120", *LLM, "--replay", seeded)["repeatable"] is True
    page = (cluster.path / "runs/latest/report.html").read_text()
    assert f"120 of {seeded}" in page and f"--replay {seeded}" in page
    other = ("--agent-type", "llm", "--seed", "8", "--ratio", "2/3", "--replay", seeded)
    done = cluster.run("run_simulation.sh", "3", "120", *other)
    assert done.returncode == 0 and "plays this game again" not in done.stderr
    assert cluster.summary()["repeatable"] is False and cluster.summary()["llm"]["replayed"] == 120


def test_a_published_folder_is_replayed_without_any_model(cluster, fake, recorded, tmp_path):
    run = recorded()
    values = cluster.values()
    shutil.copytree(cluster.path / run, tmp_path / "published")
    fake.close()
    flags = (*LLM, "--replay", str(tmp_path / "published"), "--offline")
    summary = cluster.play("3", "120", *flags, "--rounds", "2")
    assert (summary["status"], summary["llm"]["requests"], summary["llm"]["replayed"]) == ("complete", 0, 240)
    assert cluster.values() == values
    summary = cluster.play("3", "130", *flags, status=4)  # ten more, which were not recorded
    cause = "the recorded run has no usable answer to this prompt (--offline)"
    assert summary["rounds"][0]["failures"] == {cause: 10} and summary["rounds"][0]["answered"] == 120


def test_answers_alone_are_taken_where_prompts_cannot_differ(cluster, fake, recorded):
    run = recorded("--keep-texts", "none")
    values = cluster.values()
    assert not (cluster.path / run / "texts.parquet").exists()
    assert usage(cluster.play("3", "120", *LLM, "--rounds", "2", "--replay", run)) == (240, False)
    assert cluster.values() == values
    more = cluster.play("3", "150", *LLM, "--rounds", "2", "--replay", run)  # the average of round 1 is another one
    assert more["llm"]["replayed"] == 120
    other = cluster.play("3", "120", "--agent-type", "llm", "--ratio", "1/2", "--replay", run)
    assert other["llm"]["replayed"] == 0


def test_answers_of_a_seeded_run_without_texts_are_taken(cluster, fake, recorded):
    fake.repeatable = True
    run = recorded("--keep-texts", "none")
    assert usage(cluster.play("3", "120", *LLM, "--rounds", "2", "--replay", run)) == (240, False)


def test_a_replayed_run_resumes_without_the_recorded_run(cluster, fake, recorded):
    run = cluster.path / recorded()
    cluster.play("3", "120", *LLM, "--replay", str(run))
    run.rename(run.with_name("moved"))
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    summary = cluster.summary()
    assert summary["llm"]["replayed"] == 120 and [each["answered"] for each in summary["rounds"]] == [120, 120]


def test_repeats_do_not_take_the_same_answers(cluster, fake, recorded):
    run = recorded()
    done = cluster.run("run_simulation.sh", "3", "120", *LLM, "--repeats", "2", "--replay", run)
    assert done.returncode == 2 and "does not go with repeats, which would take the same answers" in done.stderr


def test_failed_answers_are_requested_again(cluster, fake, recorded):
    fake.habits = iter(["words"] * 3 + ["well"] * 10_000)
    run = recorded("--samples-per-request", "40", "--max-attempts", "1", status=4)
    failed = json.loads((cluster.path / run / "summary.json").read_text())["rounds"][0]["failed"]
    assert 0 < failed < 120
    summary = cluster.play("3", "120", *LLM, "--replay", run)
    assert summary["llm"]["replayed"] == 120 - failed and sum(body.get("n", 1) for body in fake.bodies) == failed


def test_reasoning_is_replayed_with_the_number(cluster, fake, recorded, tmp_path):
    (tmp_path / "prompts.yaml").write_text(STEPS)
    fake.thoughts = ["I think that\n33", "It is hard to say"]
    flags = ("--prompts-file", str(tmp_path / "prompts.yaml"), "--prompt", "aloud")
    run = recorded(*flags)
    values = cluster.values()
    assert usage(cluster.play("3", "120", *LLM, "--rounds", "2", *flags, "--replay", run)) == (240, False)
    assert cluster.values() == values and not fake.bodies


def test_a_killed_run_costs_only_what_is_new(cluster, fake):
    fake.held = lambda text: "Round 2" in text
    run = cluster.start("run_simulation.sh", "3", "120", *LLM, "--rounds", "2")
    until(lambda: any("Round 2" in body["messages"][1]["content"] for body in fake.bodies), 60, "in round 2")
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    fake.held = None
    killed = f"runs/{cluster.summary()['run_id']}"
    assert not (cluster.path / killed / "texts.parquet").exists()
    summary = cluster.play("3", "120", *LLM, "--rounds", "2", "--replay", killed)
    assert summary["llm"]["replayed"] == 120 and summary["status"] == "complete"


def test_the_estimate_says_how_much_is_recorded(cluster, fake, recorded):
    run = recorded()
    done = cluster.run("run_simulation.sh", "3", "100", *LLM, "--rounds", "3", "--replay", run, "--dry-run")
    line = "recorded answers: 100 in round 1, up to 100 in round 2; they cost nothing where the prompt is the same"
    assert line in done.stdout and not fake.bodies
    assert costs(done.stdout)["1"] == [0, 0, 0] and costs(done.stdout)["2"][2] > 0  # 20 others played in that run
    done = cluster.run("run_simulation.sh", "3", "120", *LLM, "--rounds", "3", "--replay", run, "--dry-run")
    assert "recorded answers: 120 in round 1, 120 in round 2; they cost nothing" in done.stdout
    assert costs(done.stdout)["in all"] == costs(done.stdout)["3"] > [0, 0, 0]
    done = cluster.run("run_simulation.sh", "3", "240", *LLM, "--rounds", "2", "--replay", run, "--dry-run")
    assert 2 * costs(done.stdout)["1"][2] == costs(done.stdout)["2"][2] > 0  # 120 of 240 are new in round 1
    offline = ("--agent-type", "llm", "--seed", "7", "--ratio", "1/2", "--replay", run, "--offline", "--dry-run")
    done = cluster.run("run_simulation.sh", "3", "100", *offline)
    assert "recorded answers: none; all answers fail (--offline)" in done.stdout
    assert "at most about 0 tokens" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--offline",), "--offline: give --replay, the folder of the run whose answers are taken"),
        (("--replay", "no/such/run"), "--replay"),
        (("--replay", "{random}"), "does nothing with --agent-type random"),
        (("--replay", "{random}", "--agent-type", "llm", "--offline"), "that run asked a language model, so no answer"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(cluster, flags, words):
    cluster.play("3", "10", "--sleep-time", "0")
    flags = [flag.format(random=f"runs/{cluster.summary()['run_id']}") for flag in flags]
    done = cluster.run("run_simulation.sh", "3", "10", *flags)
    assert done.returncode == 2 and words in one_line(done.stderr)
