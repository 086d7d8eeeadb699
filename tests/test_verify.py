"""Seeded games of language models, and the role verify, which asks the rounds of a run again."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import one_line

LLM = ("--agent-type", "llm", "--seed", "7", "--rounds", "3")


@pytest.fixture
def fake(fake):
    """A model server whose seeded answers repeat."""
    fake.repeatable = True
    return fake


def verify(checkout):
    return checkout.run("main.py", "--role", "verify", "runs/latest")


def swap_two(checkout):
    """Swap two different recorded answers of the last round, so that its tally remains the same."""
    path = checkout.path / "runs/latest/answers.parquet"
    table = pq.read_table(path)
    values = table["value"].to_pylist()
    other = next(place for place in range(-2, -len(values), -1) if values[place] != values[-1])
    values[-1], values[other] = values[other], values[-1]
    index = table.schema.get_field_index("value")
    pq.write_table(table.set_column(index, table.schema.field("value"), pa.array(values, pa.float64())), path)


def test_a_random_run_verifies_and_a_changed_answers_are_found(cluster):
    cluster.play("3", "500", "--rounds", "2", "--sleep-time", "0")
    done = verify(cluster)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1,000 of 1,000 answers are equal (100.00%)")
    swap_two(cluster)
    done = verify(cluster)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (4, "998 of 1,000 answers are equal (99.80%)")
    assert "round 1: 500 of 500 answers are equal" in done.stdout and cluster.summary()["status"] == "complete"


def test_the_rounds_of_a_seeded_run_are_asked_with_what_was_recorded(cluster, fake):
    summary = cluster.play("3", "200", *LLM)
    assert summary["repeatable"] is True
    bodies, values = fake.bodies[:], cluster.values()
    swap_two(cluster)
    fake.bodies.clear()
    done = verify(cluster)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (4, "598 of 600 answers are equal (99.67%)")
    assert sorted(map(json.dumps, fake.bodies)) == sorted(map(json.dumps, bodies))  # the round before is as it was
    assert cluster.play("3", "200", *LLM)["repeatable"] and cluster.values() == values
    again = cluster.play("3", "200", *LLM, "--samples-per-request", "7", "--dispatch", "agent")
    assert again["repeatable"] and cluster.values() == values


def test_a_seeded_run_resumes_as_if_it_had_not_ended(cluster, fake):
    cluster.play("3", "150", *LLM)
    whole = cluster.values()
    cluster.play("3", "150", *LLM[:4], "--rounds", "1")
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "3")
    assert done.returncode == 0 and "plays this game again, up to rounding" in done.stderr, done.stderr
    assert cluster.values() == whole and cluster.summary()["repeatable"] is True


def test_a_seeded_run_that_goes_on_without_seeds_does_not_claim_to_repeat(cluster, fake):
    cluster.play("3", "150", *LLM[:4], "--rounds", "1")
    fake.repeatable = False
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert done.returncode == 0 and "the model servers no longer repeat seeded answers" in done.stderr
    assert cluster.summary()["repeatable"] is False and "seed" not in fake.bodies[-1]
    assert "up to rounding" not in (cluster.path / "runs/latest/report.html").read_text()


def test_without_repeatable_servers_nothing_claims_to_repeat(cluster, fake):
    fake.repeatable = False
    done = cluster.run("run_simulation.sh", "3", "50", *LLM)
    assert done.returncode == 0 and "plays this game again" not in done.stderr
    assert cluster.summary()["repeatable"] is False and not any("seed" in body for body in fake.bodies)
    done = verify(cluster)
    assert done.returncode == 2 and "not all its answers had seeds" in one_line(done.stderr)


def test_verify_needs_servers_that_repeat(cluster, fake):
    cluster.play("3", "50", *LLM)
    page = (cluster.path / "runs/latest/report.html").read_text()
    assert "up to rounding, on model servers started with --repeatable" in page
    fake.repeatable = False
    done = verify(cluster)
    assert done.returncode == 2 and "start the model servers with ./start_vllm.sh --repeatable" in one_line(done.stderr)


def test_a_run_without_answers_is_not_verified(cluster, fake):
    fake.for_ever("words")
    cluster.play("3", "20", *LLM, "--max-attempts", "1", status=4)
    done = verify(cluster)
    assert done.returncode == 2 and "holds no answers" in one_line(done.stderr)


@pytest.mark.parametrize("runs", [(), ("runs/latest", "runs/latest")])
def test_verify_takes_one_run(command, runs):
    status, err = command("--role", "verify", *runs)
    assert status == 2 and err == "error: --role verify: give the folder of one run\n"


def test_verify_names_the_folder_that_is_missing(command):
    status, err = command("--role", "verify", "no/such/run")
    assert status == 2 and err.startswith("error: --role verify no/such/run: ")
