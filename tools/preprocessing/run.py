"""A whole run: choose the engine, write this rank's part, put parts together, tell what came of it."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

from numpy.typing import NDArray

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import Tokenizer, build_tokenizer
from tools.preprocessing import inputs
from tools.preprocessing.documents import NOT_AN_OBJECT, NOT_JSON, ONE_A_LINE
from tools.preprocessing.engine import (
    Engine,
    EngineUnavailable,
    ReferenceEngine,
    engine_source,
    first_difference,
    make_engine,
    probes,
    reference_name,
)
from tools.preprocessing.inputs import Corpus, Input, find_inputs, share
from tools.preprocessing.kinds import printable
from tools.preprocessing.merge import merge_parts, remove_part
from tools.preprocessing.outputs import check_outputs
from tools.preprocessing.part import EngineDiffers, Part, PartRun, Report, TooManyBad, quarantine_path
from tools.preprocessing.pool import WorkerPool
from tools.preprocessing.ranks import Place, Ranks, finished_report, part_prefix
from tools.preprocessing.reader import blocks_of, check_columns
from tools.preprocessing.settings import Settings
from tools.preprocessing.statistics import Statistics, document_summary
from tools.preprocessing.worker import Encoder, read_documents

_SAMPLED_BLOCKS = 8
_SAMPLED_DOCUMENTS = 8
_SAMPLED_CHARACTERS = 4000
_PREVIEWED_TOKENS = 400


def sample(parts: list[Input], keys: list[str]) -> Iterator[str]:
    """Beginnings of documents from places spread over the input."""
    total = sum(part.size for part in parts)
    taken = set()
    for number in range(_SAMPLED_BLOCKS):
        place = total * number // _SAMPLED_BLOCKS
        for part in parts:
            if place < part.size:
                break
            place -= part.size
        else:
            continue
        skip = place // inputs.CHUNK_BYTES if part.is_plain else 0
        if (part.path, skip) in taken:
            continue
        taken.add((part.path, skip))
        for block in blocks_of(part, keys, skip):
            if not block.broken:
                for _, texts in read_documents(block, keys).rows[:_SAMPLED_DOCUMENTS]:
                    yield from (text[:_SAMPLED_CHARACTERS] for text in texts)
            break


def choose_engine(settings: Settings, tokenizer: Tokenizer, parts: list[Input], label: str) -> Engine:
    """The engine that the flags ask for, compared with the reference on a sample of the input.

    `auto` takes the first that can run here and gives the same ids, and says why if that is not the fastest. Raises
    ValueError if an engine that was asked for by name cannot run or gives other ids.
    """
    reference = reference_name(tokenizer)
    wanted = settings.tokenizer_backend
    candidates = [wanted] if wanted != "auto" else ["gigatoken", *(["hf"] if reference == "reference" else [])]
    for name in candidates:
        if name == reference:
            break
        try:
            source = engine_source(name, tokenizer)
            engine = make_engine(name, tokenizer, source)
        except EngineUnavailable as error:
            reason = str(error)
        else:
            texts = [*probes(tokenizer, source), *sample(parts, settings.json_keys)]
            difference = first_difference(engine, tokenizer, texts)
            if difference is None:
                return engine
            reason = f"it gives other ids than the reference on a sample: {difference}"
        if wanted != "auto":
            raise ValueError(f"--tokenizer-backend {name}: {reason}")
        if settings.tokenizer.tokenizer_type != "NullTokenizer":
            print(f"{label}not using {name}: {reason}")
    return ReferenceEngine(tokenizer)


def check_outcome(settings: Settings, corpus: Corpus, statistics: Statistics, documents: list[int]) -> None:
    """Raises TooManyBad or ValueError if what was written must not be taken for a data set; tells of the files then."""
    damaged = [] if settings.allow_damaged_files else statistics.damaged(corpus)
    if statistics.bad_fraction > settings.max_bad_fraction or damaged or not all(documents):
        print("\n".join(statistics.file_lines(corpus)), file=sys.stderr)
    _check_bad_fraction(settings, statistics, "")
    if damaged:
        names = ", ".join(f"{printable(path)}: {statistics.files[path].trouble}" for path in damaged[:3])
        more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise TooManyBad(
            f"{len(damaged)} of {len(corpus.files)} files ended early or gave nothing ({names}{more}): fix or remove "
            "them, or give --allow-damaged-files together with --resume to keep what could be read"
        )
    for key, count in zip(settings.json_keys, documents):
        if count == 0:
            raise ValueError(f"--input {' '.join(settings.input)} has no document with text under the key {key!r}")


def _check_bad_fraction(settings: Settings, statistics: Statistics, where: str) -> None:
    """Raises TooManyBad if so much is bad already that the rest cannot make up for it."""
    if statistics.bad_fraction <= settings.max_bad_fraction:
        return
    format_errors = sum(statistics.bad.get(reason, 0) for reason in (NOT_JSON, NOT_AN_OBJECT))
    form = f" ({ONE_A_LINE})" if 2 * format_errors > statistics.bad_lines else ""
    raise TooManyBad(
        f"{100 * statistics.bad_fraction:.3g}% of the input is bad{where} ({statistics.bad_summary()}; listed in "
        f"{quarantine_path(settings.output_prefix)}), more than --max-bad-fraction {settings.max_bad_fraction:g} "
        f"allows: fix the input{form}, or give a larger fraction together with --resume to keep what is done"
    )


def _write_part(part: Part, place: Place, engine: str) -> tuple[Report, str]:
    """Write this rank's part with `engine`; returns its report and the name of the engine that ended it."""

    def check(statistics: Statistics, documents: list[int]) -> None:
        if place.ranks == 1:
            check_outcome(part.settings, part.corpus, statistics, documents)

    def check_on_the_way(statistics: Statistics, path: str) -> None:
        if place.ranks == 1:
            total = sum(file.size for file in part.inputs)
            read = f"{statistics.read_bytes / 1e6:.1f} of {total / 1e6:.1f} MB"
            where = f" after {read}, which end in {printable(path)}"
            _check_bad_fraction(part.settings, statistics, where)

    try:
        return PartRun(part, check, check_on_the_way).run(), engine
    except EngineDiffers as error:
        if part.settings.tokenizer_backend != "auto" or place.ranks > 1:
            advice = "use --tokenizer-backend hf or sentencepiece"
            raise ValueError(f"{error}; nothing that {engine} wrote is kept: {advice}") from None
        print(f"warning: {error}; starting again from the beginning with the reference tokenizer")
    reference = ReferenceEngine(part.tokenizer)
    with WorkerPool(part.settings.workers, Encoder(part.settings, part.tokenizer, reference)) as pool:
        return PartRun(part._replace(pool=pool), check, check_on_the_way).run(), reference.name


def preprocess(settings: Settings, place: Place, rank_timeout: float) -> None:
    """Write the data set of each key. Raises WorkerDied, ValueError or OSError with a sentence for the user."""
    started = time.monotonic()
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks(settings.output_prefix, place, rank_timeout))
        corpus = find_inputs(settings.input)
        check_outputs(settings, corpus)
        if place.rank == 0:
            _tell_left_aside(corpus)
        tokenizer = build_tokenizer(settings.tokenizer, settings.tokenizer.vocab_size)
        for flag, token in (("eod", tokenizer.eod), ("bos", tokenizer.bos)):
            if getattr(settings, f"append_{flag}") and token is None:
                raise ValueError(f"--append-{flag}: this tokenizer has no such token")
        mine = share(corpus.files, *place)
        check_columns(mine, settings.json_keys)
        chosen = choose_engine(settings, tokenizer, mine, place.label)
        pool = stack.enter_context(WorkerPool(settings.workers, Encoder(settings, tokenizer, chosen)))
        ranks.show_life()
        prefix = part_prefix(settings.output_prefix, place)
        part = Part(settings, prefix, mine, corpus, tokenizer, pool, place.label, ranks.check)
        engine = chosen.name
        if place.ranks == 1:
            report, engine = _write_part(part, place, engine)
            statistics, kept_bytes = report.statistics, report.kept_bytes
        else:
            finished = finished_report(settings.output_prefix, place, part.fingerprint)
            if finished:
                report = finished._replace(kept_bytes=finished.statistics.read_bytes)
            else:
                report = _write_part(part, place, engine)[0]
            ranks.done(part.fingerprint, report)
            if place.rank:
                print(f"{place.label}done: {report.statistics.lines} lines")
                return
            statistics, kept_bytes = _merge(settings, place, ranks, corpus, tokenizer)
    rate = (statistics.read_bytes - kept_bytes) / 1e6 / max(time.monotonic() - started, 1e-9)
    _tell(settings, statistics, tokenizer, corpus, engine, place, started, rate)


def _merge(
    settings: Settings, place: Place, ranks: Ranks, corpus: Corpus, tokenizer: Tokenizer
) -> tuple[Statistics, int]:
    """Put the parts together; returns their statistics, and how many of the bytes earlier runs had read."""
    places = [Place(rank, place.ranks) for rank in range(place.ranks)]
    reports = ranks.wait([settings.fingerprint(share(corpus.files, *each), tokenizer) for each in places])
    prefixes = [part_prefix(settings.output_prefix, each) for each in places]
    statistics = Statistics([0] * len(settings.json_keys))
    for report in reports:
        statistics.add(report.statistics)

    def check(documents: list[int]) -> None:
        check_outcome(settings, corpus, statistics, documents)

    merge_parts(settings, prefixes, reports, tokenizer, corpus, statistics, check)
    for each in places:
        remove_part(settings, each)
    return statistics, sum(report.kept_bytes for report in reports)


def _tell_left_aside(corpus: Corpus) -> None:
    counts = ", ".join(f"{printable(ending)} {count}" for ending, count in corpus.left_aside.items())
    parts = [f"{sum(corpus.left_aside.values())} files of other kinds ({counts})"] if counts else []
    if corpus.products:
        parts.append(f"{corpus.products} files that these tools wrote (data sets, descriptions, quarantines, journals)")
    if corpus.other_names:
        parts.append(f"{corpus.other_names} links to files that are read under another name")
    if parts:
        print(f"left aside: {' and '.join(parts)}")


def _tell(
    settings: Settings,
    statistics: Statistics,
    tokenizer: Tokenizer,
    corpus: Corpus,
    engine: str,
    place: Place,
    started: float,
    rate: float,
) -> None:
    seconds = max(time.monotonic() - started, 1e-9)
    for key, empty in zip(settings.json_keys, statistics.empty):
        print(document_summary(f"{settings.output_prefix}_{key}_document", empty))
    count = len(corpus.files)
    across = f" on {place.ranks} ranks" if place.ranks > 1 else ""
    print(
        f"read {count} file{'s' * (count > 1)}, {statistics.read_bytes / 1e6:.1f} MB with "
        f"{statistics.text_bytes / 1e6:.1f} MB of text, in "
        f"{seconds:.1f} s: {rate:.1f} MB/s (engine {engine}, "
        f"{settings.workers} workers{across})"
    )
    print("\n".join(statistics.file_lines(corpus)))
    if statistics.blank_lines:
        print(f"skipped {statistics.blank_lines} blank lines")
    if statistics.bad:
        print(
            f"left out {statistics.bad_lines} bad of {statistics.lines - statistics.blank_lines} lines "
            f"({100 * statistics.bad_fraction:.3g}% of the bytes): {statistics.bad_summary()}; listed in "
            f"{quarantine_path(settings.output_prefix)}"
        )
    for key in settings.json_keys if settings.preview else []:
        indexed = IndexedDataset(f"{settings.output_prefix}_{key}_document")
        for number in range(min(settings.preview, indexed.document_count)):
            ids = indexed.get_document(number)
            print(f"--- {key}, document {number}: {len(ids)} tokens, {_ends(ids, tokenizer)}")
            print(tokenizer.detokenize(ids[:_PREVIEWED_TOKENS].tolist()) + ("..." * (len(ids) > _PREVIEWED_TOKENS)))


def _ends(ids: NDArray, tokenizer: Tokenizer) -> str:
    begin = f"begins with token {ids[0]}" + (" (bos)" if ids[0] == tokenizer.bos else "")
    return f"{begin}, ends with token {ids[-1]}" + (" (eod)" if ids[-1] == tokenizer.eod else "")
