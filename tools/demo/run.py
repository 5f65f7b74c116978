#!/usr/bin/env python3
"""Runs all steps on real text: corpus, tokenizer, model, training on four CPU processes, and back."""

import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.demo import report  # noqa: E402
from tools.demo.console import Progress, StageFailed, run_command  # noqa: E402
from tools.demo.corpus import DOMAINS, read_corpus, write_corpus  # noqa: E402
from tools.demo.model import MODEL, VOCAB_SIZE, make_model, train_tokenizer  # noqa: E402
from tools.run_tool import parsed, tool_parser  # noqa: E402

TENSOR_PARALLEL, PIPELINE_PARALLEL = 2, 2
WEIGHTS = {"docs": "0.6", "code": "0.4"}
SEQ_LENGTH, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE = 128, 8, 32
SPLIT, SEED, EVAL_ITERS = "95,5,0", 1234, 2
CORPUS_CHARACTERS = 2_000_000
LARGEST_DIFFERENCE = 1e-4
PROMPT = "def __init__(self"
MARKER = ".made-by-the-demo"

# Names of the stages and about how many seconds each takes.
STAGES = {
    "corpus": 5, "model": 8, "preprocessing": 8, "conversion": 5, "training": 65, "resumed training": 65,
    "conversion back": 5, "comparison": 10,
}  # fmt: skip


class Demo:
    """The stages, in order; each leaves its results in the working folder."""

    def __init__(self, workdir: Path, steps: int) -> None:
        self.steps = steps
        self.half = math.ceil(steps / 2)
        self.progress = Progress(STAGES)
        self.corpus, self.hf, self.data = workdir / "corpus", workdir / "hf", workdir / "data"
        self.megatron, self.trained = workdir / "megatron", workdir / "trained_hf"
        self.logs, self.metrics, self.picture = workdir / "logs", workdir / "metrics.jsonl", workdir / "loss.png"
        self.cache, self.tensorboard = workdir / "cache", workdir / "tensorboard"

    def run(self) -> None:
        """All stages. Raises StageFailed where one fails."""
        for stage in (
            self.make_corpus, self.make_model, self.preprocess, self.convert, self.train, self.resume,
            self.convert_back, self.compare,
        ):  # fmt: skip
            stage()

    def make_corpus(self) -> None:
        self.progress.start("corpus", "Corpus: text that Python ships, its documentation and its sources")
        sizes = write_corpus(self.corpus, CORPUS_CHARACTERS)
        for domain, size in sizes.items():
            self.progress.say(f"{domain}: {size / 1e6:.1f} million characters in {self.show(self.corpus / domain)}")

    def make_model(self) -> None:
        self.progress.start("model", "Tokenizer and a random 4-expert Mixtral in Hugging Face format")
        entries = train_tokenizer(read_corpus(self.corpus), VOCAB_SIZE, self.hf)
        self.progress.update(0.3, "drawing weights")
        parameters = make_model(MODEL, self.hf)
        self.progress.say(f"{entries} tokens, {parameters / 1e6:.1f} million parameters in {self.show(self.hf)}")

    def preprocess(self) -> None:
        self.progress.start("preprocessing", "Data: tokenised into Megatron's indexed data sets")
        self.data.mkdir(parents=True)
        for number, domain in enumerate(DOMAINS):
            self.progress.update(number / len(DOMAINS), domain)
            self.command(
                "python tools/preprocess_data.py --input", self.corpus / domain, "--output-prefix", self.data / domain,
                "--json_keys text --dataset-impl mmap --tokenizer-type PretrainedTokenizerFromHF --tokenizer-model",
                self.hf, "--append-eod --workers 2", log=f"preprocess-{domain}.log",
            )  # fmt: skip

    def convert(self) -> None:
        self.progress.start("conversion", "Hugging Face to Megatron, split for TP=2 PP=2")
        self.command(
            "python tools/checkpoint/util.py --model-type GPT --loader mixtral_hf --saver mixtral --load-dir", self.hf,
            "--save-dir", self.megatron, "--tokenizer-model", self.hf / "tokenizer.json",
            "--target-tensor-parallel-size", TENSOR_PARALLEL, "--target-pipeline-parallel-size", PIPELINE_PARALLEL,
            log="convert.log", variables={"PYTHONPATH": "."},
        )  # fmt: skip

    def train(self) -> None:
        self.progress.start("training", f"Training on four CPU processes, stopped after {self.half} iterations")
        self.train_until(self.half, 0, "train.log")

    def resume(self) -> None:
        self.progress.start("resumed training", "The same command again: it resumes where it was stopped")
        self.train_until(self.steps, self.half, "train-resumed.log")

    def train_until(self, last: int, first: int, log: str) -> None:
        """Runs the example script, which ends after iteration `last`."""

        def watch() -> tuple[float, str]:
            steps = report.read_metrics(self.metrics).steps
            if not steps or steps[-1][0] <= first:
                return 0.0, "starting four processes"
            iteration, loss = steps[-1]
            return (iteration - first) / (last - first), f"iteration {iteration}/{self.steps} loss {loss:.3f}"

        self.command(
            "bash mixtral_4x7b_example.sh --adam-beta2 0.95 --exit-interval", self.half, log=log,
            variables=self.training_variables(), watch=watch,
        )  # fmt: skip
        reached = max((iteration for iteration, _ in report.read_metrics(self.metrics).steps), default=0)
        if reached != last:
            raise StageFailed(f"training should have ended at iteration {last}, not {reached}: see {self.logs / log}")

    def training_variables(self) -> dict[str, str]:
        """What the example script gets through its environment."""
        blend = " ".join(
            f"{WEIGHTS[domain]} {shlex.quote(self.show(prefix))}" for domain, prefix in self.prefixes().items()
        )
        settings: dict[str, object] = {
            "DEVICE": "cpu", "PRECISION": "fp32", "TP": TENSOR_PARALLEL, "PP": PIPELINE_PARALLEL,
            "CHECKPOINT_PATH": self.show(self.megatron), "BLENDED_DATA": blend, "TOKENIZER_MODEL": self.show(self.hf),
            "NUM_LAYERS": MODEL.num_layers, "HIDDEN_SIZE": MODEL.hidden_size, "FFN_HIDDEN_SIZE": MODEL.ffn_hidden_size,
            "NUM_ATTENTION_HEADS": MODEL.num_attention_heads, "NUM_QUERY_GROUPS": MODEL.num_query_groups,
            "NUM_EXPERTS": MODEL.num_experts, "MAX_POSITION_EMBEDDINGS": MODEL.max_position_embeddings,
            "SEQ_LENGTH": SEQ_LENGTH, "MICRO_BATCH_SIZE": MICRO_BATCH_SIZE, "GLOBAL_BATCH_SIZE": GLOBAL_BATCH_SIZE,
            "TRAIN_ITERS": self.steps, "LR": "4e-3", "MIN_LR": "4e-4", "LR_WARMUP_ITERS": max(1, self.steps // 20),
            "SPLIT": SPLIT, "SEED": SEED, "EVAL_INTERVAL": max(1, self.steps // 5), "EVAL_ITERS": EVAL_ITERS,
            "SAVE_INTERVAL": self.steps, "METRICS_PATH": self.show(self.metrics),
            "TENSORBOARD_DIR": self.show(self.tensorboard), "DATA_CACHE_PATH": self.show(self.cache),
        }  # fmt: skip
        return {name: str(value) for name, value in settings.items()}

    def convert_back(self) -> None:
        self.progress.start("conversion back", "Megatron to Hugging Face")
        self.command(
            "python tools/checkpoint/convert_megatron_to_hf_mixtral.py --megatron-checkpoint-path", self.megatron,
            "--huggingface-config-path", self.hf, "--huggingface-checkpoint-path", self.trained,
            "--tensor-parallel-size", TENSOR_PARALLEL, "--pipeline-parallel-size", PIPELINE_PARALLEL,
            log="convert-back.log", variables={"PYTHONPATH": "."},
        )  # fmt: skip

    def compare(self) -> None:
        self.progress.start("comparison", "The trained model in transformers, on the trainer's held-out text")
        import torch
        from transformers import AutoTokenizer, MixtralForCausalLM

        metrics = report.read_metrics(self.metrics)
        report.check_run(metrics, self.steps)
        samples = report.validation_samples(
            [word for domain, prefix in self.prefixes().items() for word in (WEIGHTS[domain], str(prefix))],
            split=SPLIT, seq_length=SEQ_LENGTH, seed=SEED, train_samples=self.steps * GLOBAL_BATCH_SIZE,
            count=EVAL_ITERS * GLOBAL_BATCH_SIZE, tokenizer=self.hf, cache=self.cache,
        )  # fmt: skip
        self.progress.update(0.2, "loading")
        model = MixtralForCausalLM.from_pretrained(self.trained, dtype=torch.float32).eval()
        self.progress.update(0.5, "loss")
        loss = report.transformers_loss(model, samples)
        self.progress.update(0.8, "continuation")
        continuation = report.continue_text(model, AutoTokenizer.from_pretrained(self.trained), PROMPT, 40)
        report.draw_loss(metrics, self.half, self.picture)
        self.progress.update(1.0, "")
        self.show_results(metrics, loss, continuation)

    def show_results(self, metrics: report.Metrics, loss: float, continuation: str) -> None:
        """Prints the summary. Raises StageFailed if transformers and the trainer disagree."""
        trained = metrics.evaluations[-1][1]
        uniform = math.log(VOCAB_SIZE)
        speed = sorted(metrics.tokens_per_second)[len(metrics.tokens_per_second) // 2]
        self.progress.say(
            f"\nloss at the start       {metrics.steps[0][1]:.4f}   (a uniform guess: {uniform:.4f})\n"
            f"loss at the end         {metrics.steps[-1][1]:.4f}   ({speed:,.0f} tokens a second)\n"
            f"held-out, trainer       {trained:.6f}\n"
            f"held-out, transformers  {loss:.6f} (difference {abs(loss - trained):.1e})\n"
            f"continuation            {PROMPT!r} -> {continuation!r}\n"
            f"loss curve              {self.show(self.picture)}\n"
            f"trained model           {self.show(self.trained)}\n"
        )
        if not abs(loss - trained) <= LARGEST_DIFFERENCE:
            raise StageFailed(
                f"transformers and the trainer disagree on the held-out loss: {loss} and {trained} differ by more than "
                f"{LARGEST_DIFFERENCE}"
            )

    def prefixes(self) -> dict[str, Path]:
        """The tokenised data set of each domain."""
        return {domain: self.data / f"{domain}_text_document" for domain in DOMAINS}

    def show(self, path: Path) -> str:
        """A path as commands and messages name it: relative to the project where it lies in it."""
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    def command(
        self,
        *parts: str | Path | int,
        log: str,
        variables: Mapping[str, str] | None = None,
        watch: Callable[[], tuple[float, str]] | None = None,
    ) -> None:
        """Runs a command in the project's folder: the words of each string, and each path or number as one word."""
        words: list[str] = []
        for part in parts:
            words += [self.show(part)] if isinstance(part, Path) else str(part).split()
        log_path = self.logs / log
        run_command(words, log=log_path, folder=ROOT, progress=self.progress, variables=variables, watch=watch)


def prepare(workdir: Path) -> Path:
    """Empties the working folder of an earlier demo. Raises StageFailed if it holds anything else."""
    workdir = workdir.resolve()
    if workdir.exists() and not workdir.is_dir():
        raise StageFailed(f"{workdir} is not a folder: name another with --workdir")
    if workdir.is_dir() and any(workdir.iterdir()):
        if not (workdir / MARKER).exists():
            raise StageFailed(f"{workdir} holds files that no demo made: name an empty or new folder with --workdir")
        for entry in workdir.iterdir():  # the marker stays, so that an interrupted start can be repeated
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / MARKER).touch()
    return workdir


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = tool_parser(__doc__, "example: python tools/demo/run.py --workdir /tmp/demo --steps 200")
    parser.add_argument(
        "--workdir", type=Path, default=ROOT / "demo", help="folder for everything it makes (default: demo)"
    )
    parser.add_argument("--steps", type=int, default=100, help="training iterations (default: %(default)s)")
    options = parsed(parser, arguments)
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}: it stops in the middle")
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.monotonic()
    demo = None
    try:
        demo = Demo(prepare(options.workdir), options.steps)
        demo.run()
        demo.progress.say(f"All steps took {time.monotonic() - start:.0f} seconds.")
        return 0
    except (StageFailed, ValueError, OSError) as error:
        if demo is not None:
            demo.progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    finally:
        if demo is not None:
            demo.progress.close()


if __name__ == "__main__":
    sys.exit(main())
