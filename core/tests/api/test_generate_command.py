"""`paddock generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from core.tests.api.conftest import Make, Run

from paddock.cli.generate import read_lines
from paddock.errors import OptionError


def test_one_prompt_streams_its_text(make: Make, run: Run) -> None:
    """A single prompt prints the answer and nothing else."""
    result = run(make(), "generate", "model", "the fox")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "xof eht\n", "")


def test_json_lines_follow_the_prompts_and_failures_set_the_exit_code(make: Make, run: Run) -> None:
    """One object a line in the order given; a failed prompt says why, the others are answered, the code is 1."""
    result = run(make(), "generate", "model", "ab", "", "süß", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["ba", "", "ßüs"]
    assert set(lines[0]) == {"prompt", "text", "token_ids", "finish_reason"}
    assert (lines[1]["finish_reason"], "empty" in lines[1]["error"]) == ("error", True)
    assert result.exit_code == 1


def test_several_prompts_print_under_their_names(make: Make, run: Run) -> None:
    """Each answer stands below its prompt; errors go to standard error."""
    result = run(make(), "generate", "model", "ab", "")
    assert result.stdout == "> ab\nba\n\n> \n\n\n"
    assert "the prompt is empty" in result.stderr
    assert result.exit_code == 1


def test_prompts_come_from_arguments_standard_input_and_a_file(make: Make, run: Run, tmp_path: Path) -> None:
    """`-` stands for the lines of standard input; the file's lines come last."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfef\r\ngh\n")
    result = run(make(), "generate", "model", "ab", "-", "--prompts-file", str(path), "--json", input=b"cd\n")
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["ab", "cd", "ef", "gh"]


def test_no_prompt_is_wrong_usage(make: Make, run: Run) -> None:
    """Without any prompt the command says how to give one."""
    result = run(make(), "generate", "model")
    assert result.exit_code == 2
    assert "--prompts-file" in result.stderr


def test_sampling_options_reach_the_request(make: Make, run: Run) -> None:
    """Length and stop strings given on the command line hold; a value out of range is an error that names it."""
    assert run(make(), "generate", "model", "abcdef", "--max-tokens", "2").stdout == "fe\n"
    assert run(make(), "generate", "model", "abcdef", "--stop", "c", "--stop", "zz").stdout == "fed\n"
    assert "temperature is nan" in str(run(make(), "generate", "model", "x", "--temperature", "nan").exception)


def test_a_line_that_is_no_utf8_is_found() -> None:
    """The error names file, line and byte; other line separators than the line feed stay in the prompt."""
    assert read_lines("a\u2028b\x0b\nc\n\n".encode(), "f") == ["a\u2028b\x0b", "c", ""]
    assert read_lines(b"", "f") == []
    with pytest.raises(OptionError, match=r"f is not UTF-8: line 2, byte 3 is 0xff"):
        read_lines(b"ok\nab\xff\n", "f")


def test_a_missing_prompts_file_is_named(make: Make, run: Run) -> None:
    """A file that is not there is an error with its path."""
    assert "nowhere.txt cannot be read" in str(run(make(), "generate", "model", "--prompts-file", "nowhere.txt").exception)
