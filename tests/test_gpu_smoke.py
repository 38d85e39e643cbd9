"""The first thing to run on a machine with GPUs: here on the CPU, which takes the same way."""

import pytest
from test_benchmarks import load


@pytest.fixture(scope="module")
def smoke():
    return load("gpu_smoke")


def test_a_failed_check_is_told_and_those_that_need_it_are_left_out(smoke, capsys):
    def fail():
        raise smoke.CheckFailed("RuntimeError: no kernel\nmore of it")

    ran = []
    checks = [
        smoke.Check("train", fail),
        smoke.Check("encode", lambda: ran.append("encode"), needs=("train",)),
        smoke.Check("train-lm", lambda: ran.append("train-lm")),
        smoke.Check("two", lambda: ran.append("two"), skip="needs two GPUs, there is 1"),
    ]
    assert smoke.report(checks, []) == 1 and ran == ["train-lm"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["failed", "skipped", "ok", "skipped"]
    assert "RuntimeError: no kernel" in lines[0] and "more of it" not in lines[0]
    assert "'train'" in lines[1] and lines[3].endswith("there is 1") and lines[4] == "1 ok, 1 failed, 2 skipped"


def test_chosen_checks_bring_those_whose_results_they_read(smoke, capsys):
    ran = []
    checks = [
        smoke.Check("a", lambda: ran.append("a")),
        smoke.Check("b", lambda: ran.append("b"), needs=("a",)),
        smoke.Check("c", lambda: ran.append("c")),
    ]
    assert smoke.report(checks, ["b"]) == 0 and ran == ["a", "b"]


def test_the_error_of_a_log_is_its_first_traceback_s(smoke):
    log = "step 1\nTraceback (most recent call last):\n  File ...\nValueError: wrong\n[rank1]: KeyError: 'x'\n"
    assert smoke.error_in(log) == "ValueError: wrong"
    assert smoke.error_in("torch.distributed...ChildFailedError: \nno traceback") == "no traceback"


def test_without_a_gpu_it_says_so(smoke, capsys, monkeypatch):
    monkeypatch.setattr(smoke.torch.cuda, "device_count", lambda: 0)
    assert smoke.main([]) == 0 and "--device cpu" in capsys.readouterr().out


def test_one_command_goes_the_whole_way_on_the_cpu(smoke, tmp_path, capsys):
    assert smoke.main(["--device", "cpu", "--only", "train-lm", "--folder", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )
    assert (tmp_path / "lm" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_all_of_it_runs_on_the_cpu(smoke, capsys):
    assert smoke.main(["--device", "cpu"]) == 0, capsys.readouterr().out
