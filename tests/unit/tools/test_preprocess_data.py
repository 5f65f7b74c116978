"""tools/preprocess_data.py as a user runs it: the right tokens, the same for any workers, and refusals in words."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tools import preprocess_data
from tools.preprocessing import documents, inputs
from tools.preprocessing.progress import Progress

ROOT = Path(__file__).resolve().parents[3]
EOD = 99


def write_lines(path: Path, documents: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def arguments(source: Path | str, output: Path, *more: str) -> list[str]:
    return [
        "--input", str(source), "--output-prefix", str(output), "--tokenizer-type", "NullTokenizer",
        "--vocab-size", "100", *(() if "--workers" in more else ("--workers", "1")), *more,
    ]  # fmt: skip


def documents_of(prefix: Path, key: str = "text") -> list[list[int]]:
    indexed = IndexedDataset(f"{prefix}_{key}_document")
    return [indexed[i].tolist() for i in range(len(indexed))]


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one sentence a refused run ends with; asserts that it left nothing behind."""
    output = Path(args[args.index("--output-prefix") + 1])
    assert preprocess_data.main(list(args)) == 1
    assert not list(output.parent.glob(f"{output.name}*"))
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def restore_signals():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


pytestmark = pytest.mark.usefixtures("restore_signals")


def test_files_of_a_folder_are_read_in_natural_order(tmp_path: Path) -> None:
    for i in (10, 2, 1):
        write_lines(tmp_path / "in" / f"{i}.jsonl", [{"text": f"{i} 7"}, {"text": f"{i} 8"}])
    write_lines(tmp_path / "in" / "sub" / "3.json", [{"text": "3"}])
    (tmp_path / "in" / "readme.txt").write_text("not data")
    assert preprocess_data.main(arguments(tmp_path / "in", tmp_path / "out")) == 0
    expected = [[1, 7], [1, 8], [2, 7], [2, 8], [10, 7], [10, 8], [3]]
    assert documents_of(tmp_path / "out") == expected
    assert preprocess_data.main(arguments(tmp_path / "in" / "*.jsonl", tmp_path / "out", "--append-eod")) == 0
    assert documents_of(tmp_path / "out") == [[*document, EOD] for document in expected[:-1]]
    assert preprocess_data.main(arguments(tmp_path / "in" / "2.jsonl", tmp_path / "out")) == 0
    assert documents_of(tmp_path / "out") == expected[2:4]


def test_a_glob_that_names_an_existing_file_is_that_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "a[1].jsonl", [{"text": "5"}])
    assert preprocess_data.main(arguments(tmp_path / "a[1].jsonl", tmp_path / "out")) == 0
    assert documents_of(tmp_path / "out") == [[5]]


@pytest.mark.parametrize("flag", ["--json-keys", "--json_keys"])
def test_each_key_becomes_a_data_set(tmp_path: Path, flag: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "1 2", "title": "3"}, {"title": "4", "text": ""}])
    more = (flag, "title", "text", "--dataset-impl", "mmap", "--append-eod")
    assert preprocess_data.main(arguments(source, tmp_path / "out", *more)) == 0
    assert documents_of(tmp_path / "out", "title") == [[3, EOD], [4, EOD]]
    assert documents_of(tmp_path / "out", "text") == [[1, 2, EOD]], "an empty text is no document"


def test_lines_survive_any_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk size, so that a cut falls before, after and into each newline, blank line and byte order mark."""
    lines = ['{"text": "1"}', "", '{"text": "22 33"}\r', "   ", '{"text": "4", "x": "é中"}', '{"text": "5"}']
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    for size in range(1, source.stat().st_size + 2):
        monkeypatch.setattr(inputs, "CHUNK_BYTES", size)
        assert preprocess_data.main(arguments(source, tmp_path / "out")) == 0
        assert documents_of(tmp_path / "out") == [[1], [22, 33], [4], [5]], size


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [{"text": " ".join(str((i * k) % 99) for k in range(i % 50))} for i in range(600)]
    for part in range(3):
        write_lines(tmp_path / "in" / f"{part}.jsonl", documents[part::3])
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1000)
    outputs = []
    for workers in (1, 2, 5):
        prefix = tmp_path / f"out{workers}"
        assert preprocess_data.main(arguments(tmp_path / "in", prefix, "--workers", str(workers))) == 0
        outputs.append([Path(f"{prefix}_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx")])
    assert outputs[0] == outputs[1] == outputs[2]
    expected = [[int(token) for token in d["text"].split()] for part in range(3) for d in documents[part::3]]
    assert documents_of(tmp_path / "out2") == [document for document in expected if document]


BAD_LINES = {
    "not json": (b'{"text": "1"', "invalid JSON", "delimiter"),
    "first line of an array": (b"[", "invalid JSON", "one object a line"),
    "first line of an object": (b"{ ", "invalid JSON", "one object a line"),
    "too deep": (b"[" * 100_000, "invalid JSON", "recursion"),
    "array": (b"[1, 2]", "not an object", "this is an array"),
    "number": (b"3", "not an object", "this is a number"),
    "missing key": (b'{"body": "1", "id": 2}', "missing key", "no key 'text'; its keys are 'body', 'id'"),
    "null": (b'{"text": null}', "not a string", "the value of 'text' is null, not a string"),
    "list": (b'{"text": ["1"]}', "not a string", "the value of 'text' is an array, not a string"),
    "bad utf-8": (b'{"text": "1 \xff"}', "bad UTF-8", "byte 13 of the line"),
    "utf-16": ('{"text": "1"}'.encode("utf-16-le"), "invalid JSON", "column 2"),
    "surrogate": (b'{"text": "\\ud800"}', "bad escape", "surrogate"),
    "bad token": (b'{"text": "1 x"}', "not tokens", "NullTokenizer takes"),
    "large token": (b'{"text": "100"}', "not tokens", "token id 100 is outside the vocabulary of 100"),
}


def quarantined(prefix: Path) -> list[dict]:
    """The entries of the quarantine file."""
    return [json.loads(line) for line in Path(f"{prefix}_quarantine.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("parser", ["orjson", "json"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_left_out_and_listed(tmp_path: Path, name: str, parser: str, monkeypatch) -> None:
    line, reason, detail = BAD_LINES[name]
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 64)
    if parser == "json":
        monkeypatch.setattr(documents, "orjson", None)
    write_lines(tmp_path / "in" / "1.jsonl", [{"text": "1"}] * 9)
    good = b'{"text": "2"}\n'
    (tmp_path / "in" / "2.jsonl").write_bytes(good * 20 + line + b"\n" + good * 3 + line)
    allow = ("--max-bad-fraction", "1", "--allow-damaged-files")  # of some lines the file seems to be cut
    assert preprocess_data.main(arguments(tmp_path / "in", tmp_path / "out", *allow)) == 0
    assert documents_of(tmp_path / "out") == [[1]] * 9 + [[2]] * 23
    entries = quarantined(tmp_path / "out")
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in entries] == [
        (f"{tmp_path}/in/2.jsonl", 21, reason),
        (f"{tmp_path}/in/2.jsonl", 25, reason),
    ]
    assert detail in entries[0].get("detail", "")


def test_a_bad_line_of_a_file_with_a_name_that_is_no_utf8_is_listed(tmp_path: Path) -> None:
    source = write_lines(Path(os.fsdecode(bytes(tmp_path) + b"/\xff\xe4.jsonl")), [{"text": "1"}] * 20 + [{}])
    assert preprocess_data.main(arguments(tmp_path, tmp_path / "out")) == 0
    assert [entry["file"] for entry in quarantined(tmp_path / "out")] == [str(source)]


def test_numbers_that_are_not_json_everywhere_pass_in_other_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1", "score": NaN}\n{"text": "2", "big": 1' + "0" * 400 + "}\n")
    assert preprocess_data.main(arguments(tmp_path / "a.jsonl", tmp_path / "out")) == 0
    assert documents_of(tmp_path / "out") == [[1], [2]]


def test_too_many_bad_lines_are_refused_and_the_work_is_kept(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1"}\n' * 8 + b"bad" * 9 + b"\n" + b"\n" * 50)
    command = arguments(tmp_path / "a.jsonl", tmp_path / "out", "--max-bad-fraction")
    assert preprocess_data.main([*command, "0.19"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 20% of the input is bad (invalid JSON 1; listed in ")
    assert not list(tmp_path.glob("out*.idx")) and len(quarantined(tmp_path / "out")) == 1
    assert preprocess_data.main([*command, "0.2", "--resume"]) == 0
    assert "resuming after 8 documents" in capsys.readouterr().out
    assert documents_of(tmp_path / "out") == [[1]] * 8 and len(quarantined(tmp_path / "out")) == 1
    left = {f"out{end}" for end in ("_quarantine.jsonl", *(f"_text_document.{s}" for s in ("bin", "idx", "json")))}
    assert {path.name for path in tmp_path.glob("out*")} == left


def test_inputs_with_nothing_in_them_are_refused(tmp_path: Path, capsys) -> None:
    missing = refusal(capsys, *arguments(tmp_path / "none", tmp_path / "out"))
    assert missing == f"error: --input {tmp_path}/none is not a file, a folder, or a pattern that matches a file"
    (tmp_path / "in").mkdir()
    assert "no files in it that end in .json, .jsonl, .ndjson" in refusal(
        capsys, *arguments(tmp_path / "in", tmp_path / "out")
    )
    (tmp_path / "in" / "1.jsonl").write_text("")
    assert "no document" in refusal(capsys, *arguments(tmp_path / "in", tmp_path / "out"))
    (tmp_path / "in" / "1.jsonl").write_text('\n\n{"text": ""}\n{"text": " "}\n')
    assert "no document" in refusal(capsys, *arguments(tmp_path / "in", tmp_path / "out", "--append-eod"))


def test_a_wrong_tokenizer_is_refused(tmp_path: Path, capsys) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "1"}])
    base = ("--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-type")
    assert "--vocab-size" in refusal(capsys, *base, "NullTokenizer")
    missing = refusal(capsys, *base, "PretrainedTokenizerFromHF", "--tokenizer-model", "no/folder")
    assert "does not exist" in missing and "cannot write" not in missing


def test_an_old_output_stays_when_a_run_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "1"}])
    assert preprocess_data.main(arguments(source, tmp_path / "out")) == 0
    write_lines(tmp_path / "a.jsonl", [{"text": ""}])
    assert preprocess_data.main(arguments(source, tmp_path / "out")) == 1
    assert documents_of(tmp_path / "out") == [[1]]


def test_wide_vocabularies_get_wide_tokens(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "65499"}])
    for size, dtype in (("65500", "int32"), ("70000", "int32")):
        assert preprocess_data.main(arguments(source, tmp_path / "out", "--vocab-size", size)) == 0
        assert IndexedDataset(tmp_path / "out_text_document").dtype == dtype
        assert documents_of(tmp_path / "out") == [[65499]]


def run_tool(*args: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_command_runs_from_anywhere_with_a_hugging_face_folder(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["a b"], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    (tmp_path / "hf").mkdir()
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    texts = ["Grüße, 世界! " * 50, "a" * 1000, "def f():\n\treturn 1\n"]
    write_lines(tmp_path / "in" / "0.jsonl", [{"text": text} for text in texts])
    process = run_tool(
        "--input", "in", "--output-prefix", "new/out", "--tokenizer-type", "PretrainedTokenizerFromHF",
        "--tokenizer-model", "hf", "--append-eod", "--workers", "2", cwd=tmp_path,
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert documents_of(tmp_path / "new" / "out") == [[*tokenizer.encode(text).ids, 0] for text in texts]
    assert "3 documents" in stdout and "100%" in stderr and "MB/s" in stderr


def children(pid: int) -> list[int]:
    """Worker processes of the tool, by the parent recorded in /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid:
                found.append(int(stat.parent.name))
        except (OSError, IndexError):
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("victim", ["worker", "tool by TERM", "tool by INT", "tool by KILL"])
def test_a_killed_run_ends_with_a_reason_and_no_output(tmp_path: Path, victim: str) -> None:
    """The input is larger than the run has time for; killing starts when the workers exist and tokens are written."""
    line = json.dumps({"text": "1 2 3 4 5 6 7 8 9 " * 2000}) + "\n"
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(line for _ in range(3000))
    process = run_tool(*arguments(tmp_path / "a.jsonl", tmp_path / "out", "--workers", "2"))
    partial = tmp_path / "out_text_document.bin.tmp"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
    workers = children(process.pid)
    assert len(workers) == 2
    target, number = {
        "worker": (workers[1], signal.SIGKILL),
        "tool by TERM": (process.pid, signal.SIGTERM),
        "tool by INT": (process.pid, signal.SIGINT),
        "tool by KILL": (process.pid, signal.SIGKILL),
    }[victim]
    os.kill(target, number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == {"worker": 1, "tool by TERM": 143, "tool by INT": 130, "tool by KILL": -9}[victim]
    assert "Traceback" not in stderr
    if victim == "worker":
        assert "error: a worker process ended unexpectedly" in stderr
    wait_until(lambda: not any(alive(pid) for pid in workers))
    left = sorted(path.name for path in tmp_path.glob("out*"))
    temporary = ["out_quarantine.jsonl.tmp", *(f"out_text_document.{end}.tmp" for end in ("bin", "doc", "idx"))]
    assert left == ([] if victim != "tool by KILL" else temporary)
    write_lines(tmp_path / "b.jsonl", [{"text": "1"}])
    assert preprocess_data.main(arguments(tmp_path / "b.jsonl", tmp_path / "out")) == 0
    left = sorted(path.name for path in tmp_path.glob("out*"))
    assert left == [f"out_text_document.{end}" for end in ("bin", "idx", "json")]


def test_a_very_long_line_does_not_disturb_its_neighbours(tmp_path: Path) -> None:
    tokens = [i % 99 for i in range(1_500_000)]
    source = write_lines(tmp_path / "a.jsonl", [{"text": "1"}, {"text": " ".join(map(str, tokens))}, {"text": "2"}])
    assert source.stat().st_size > 4 * inputs.CHUNK_BYTES
    assert preprocess_data.main(arguments(source, tmp_path / "out")) == 0
    assert documents_of(tmp_path / "out") == [[1], tokens, [2]]


def test_usage_errors_exit_with_2(tmp_path: Path, capsys) -> None:
    for more in (
        ("--workers", "0"),
        ("--log-interval", "0"),
        ("--json-keys", "text", "text"),
        ("--json-keys", "../text"),
        ("--nonsense",),
        ("--max-bad-fraction", "2"),
    ):
        with pytest.raises(SystemExit) as exit_:
            preprocess_data.main(arguments(tmp_path, tmp_path / "out", *more))
        assert exit_.value.code == 2 and more[0] in capsys.readouterr().err


def test_the_tool_starts_without_torch() -> None:
    program = "import sys\nfrom tools import preprocess_data\nprint({'torch', 'transformers'} & set(sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_a_run_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "1"}])
    command = arguments(source, tmp_path / "out")
    program = f"""import sys
from tools import preprocess_data
assert preprocess_data.main({command!r}) == 0
print({{'torch', 'transformers', 'tokenizers', 'sentencepiece', 'pyarrow', 'awkward', 'zstandard'}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys, monkeypatch) -> None:
    clock = iter(float(second) for second in range(0, 100, 10))
    monkeypatch.setattr("tools.preprocessing.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    Progress(4_000_000, 0, 1000, "").update(1_000_000, 10, 2)
    shown = capsys.readouterr().err
    assert "\n" not in shown and shown.startswith("\r") and "[######......" in shown
    assert "25% | 1.0 of 4.0 MB | 0.1 MB/s | 0:01:00 left | 10 documents | 2 bad" in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    progress = Progress(4_000_000, 0, 1000, "")
    progress.update(1_000_000, 999, 0)
    assert capsys.readouterr().err == ""
    progress.update(1_000_000, 1000, 0)
    assert capsys.readouterr().err.count("\n") == 1


def test_preview_decodes_what_was_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ends, more documents than there are, and a long one, of which the beginning is shown."""
    long = " ".join(["7"] * 401)
    texts = ["1 2", "3 99", long, "5"]
    source = write_lines(tmp_path / "a.jsonl", [{"text": text, "title": "8"} for text in texts])
    more = ("--append-eod", "--json-keys", "text", "title")
    assert preprocess_data.main(arguments(source, tmp_path / "out", "--preview", "3", *more)) == 0
    shown = capsys.readouterr().out.split("--- ")[1:]
    assert [text.splitlines() for text in shown[:3]] == [
        ["text, document 0: 3 tokens, begins with token 1, ends with token 99 (eod)", "1 2 99"],
        ["text, document 1: 2 tokens, begins with token 3, ends with token 99 (eod)", "3 99"],
        ["text, document 2: 402 tokens, begins with token 7, ends with token 99 (eod)", long[: 2 * 400 - 1] + "..."],
    ]
    assert len(shown) == 6 and shown[3].startswith("title, document 0: 2 tokens")
    assert preprocess_data.main(arguments(source, tmp_path / "out", "--preview", "9")) == 0
    output = capsys.readouterr().out
    assert output.count("--- ") == 4 and "document 0: 2 tokens, begins with token 1, ends with token 2\n1 2" in output


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_that_is_one_array_is_refused_with_advice(tmp_path: Path, capsys, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "1"}, {"text": "2"}], indent=indent))
    assert preprocess_data.main(arguments(tmp_path / "a.json", tmp_path / "out")) == 1
    assert "each line must be a JSON object" in capsys.readouterr().err.splitlines()[-1]
