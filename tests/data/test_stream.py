"""Streams: killed at any batch and continued bit for bit, from any kind of file, bad rows named on the way."""

import gzip
import json

import datasets
import numpy as np
import pytest

from jaxalign.data import Bad, DataConfig, Filters, MixturePart, StreamBatches, encode, inspect, load


def texts(name, count):
    return [{"text": f"The {name} is blue {'and deep ' * (i % 4)}{i}"} for i in range(count)]


def write_all(tmp_path, rows, kind):
    """The same rows as JSON lines with blank lines, compressed ones, CSV, or Parquet."""
    path = tmp_path / {"json": "a.jsonl", "gzip": "a.jsonl.gz", "csv": "a.csv", "parquet": "a.parquet"}[kind]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "csv":
        path.write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))
    else:
        body = "\n".join("\n" * (i % 2) + json.dumps(row) for i, row in enumerate(rows)).encode()
        path.write_bytes(gzip.compress(body) if kind == "gzip" else body)
    return str(path)


def stream_of(config, tokenizer, kind="sft"):
    stream = load(config, tokenizer, kind).stream
    assert stream is not None
    return stream


def open_batches(stream, size=4, **options):
    return StreamBatches(stream, size, lambda examples: [each["input_ids"].tobytes() for each in examples], **options)


def facts(batch):
    removed = [(each.line, each.filter) for each in batch.removed]
    return batch.data, batch.indices.tolist(), batch.epoch, batch.tokens, batch.dropped, removed


def take(batches, count):
    return [facts(next(batches)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["json", "gzip", "csv", "parquet"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_position_is_resumed_exactly(chatml, tmp_path, kind, prefetch):
    """22 rows, windows of 6, batches of 4: 14 batches are two and a half passes, and end inside and between windows."""
    path = write_all(tmp_path, texts("sky", 22), kind)
    config = DataConfig(path, streaming=True, shuffle_window=6)
    stream, places = stream_of(config, chatml), {}
    with open_batches(stream, prefetch=prefetch) as source:
        whole = []
        for position in range(14):
            places[position] = source.state()
            whole += take(source, 1)
    with open_batches(stream_of(config, chatml), prefetch=prefetch) as source:
        for position, state in places.items():
            source.restore(state)
            assert source.state()["position"] == position
            assert take(source, 14 - position) == whole[position:]
    given = [ids for data, *_ in whole for ids in data]
    expected = sorted(encode(chatml, row, "sft", config)["input_ids"].tobytes() for row in texts("sky", 22))
    # A pass is finished before the next begins; the window that holds its end (18 to 24) holds rows of both.
    assert len(set(given[:18])) == 18 and set(given[:24]) == set(expected) and given[:22] != sorted(given[:22])
    assert (whole[0][2], whole[-1][2]) == (0, 2)


def test_windows_are_shuffled_and_nothing_else(chatml, tmp_path):
    path = write_all(tmp_path, texts("sky", 20), "json")
    config = DataConfig(path, streaming=True, shuffle_window=5)
    rows = [encode(chatml, row, "sft", config)["input_ids"].tobytes() for row in texts("sky", 20)]

    def order(**options):
        with open_batches(stream_of(DataConfig(path, streaming=True, **options), chatml), 20) as source:
            return [rows.index(ids) for ids in next(source).data]

    found = order(shuffle_window=5)
    assert [sorted(found[i : i + 5]) for i in range(0, 20, 5)] == [list(range(i, i + 5)) for i in range(0, 20, 5)]
    assert found != list(range(20)) != order(shuffle_window=5, seed=1) != found
    assert order(shuffle=False) == list(range(20))
    assert sorted(order(shuffle_window=20)) == list(range(20))


def test_processes_share_one_order(chatml, tmp_path):
    stream = stream_of(DataConfig(write_all(tmp_path, texts("sky", 9), "json"), streaming=True), chatml)
    batches = []
    for options in ({}, {"process": 0, "processes": 2}, {"process": 1, "processes": 2}):
        with open_batches(stream, 5, **options) as source:
            batches.append([next(source) for _ in range(4)])
    for whole, one, other in zip(*batches, strict=True):
        assert whole.data == one.data == other.data
        joined = np.full(5, -1)
        joined[0::2], joined[1::2] = one.own, other.own
        assert joined.tolist() == whole.indices.tolist()


def test_mixtures_keep_their_shares_and_resume(chatml, tmp_path, write):
    """Weights 3 and 1: of any 4n examples in reading order 3n are of the first part, however short that part is."""
    sky, sea = write("sky.jsonl", *texts("sky", 5)), write("sea.jsonl", *texts("sea", 7))
    parts = (MixturePart(sky, weight=0.75), MixturePart(sea, weight=0.25))
    config = DataConfig(mixture=parts, streaming=True, shuffle_window=8)
    stream = stream_of(config, chatml)
    with open_batches(stream, 8) as source:
        whole = take(source, 12)
        state = source.state()
        more = take(source, 3)
    for data, *_ in whole:
        assert sum(b"sea" in chatml.decode(np.frombuffer(ids, np.int32).tolist()).encode() for ids in data) == 2
    assert whole[-1][2] == 3  # 24 examples of the part of 7 rows: the third pass is done
    with open_batches(stream_of(config, chatml), 8) as source:
        source.restore(state)
        assert take(source, 3) == more


def test_bad_rows_are_named_or_counted_once(chatml, write):
    rows = [*texts("sky", 4), {"text": ""}, "{broken", *texts("sea", 4), {"text": "long " * 300}]
    path = write("a.jsonl", *rows)
    stop = DataConfig(path, streaming=True, stream_sample=4, max_length=200)
    named = r"training data: .*a\.jsonl:5: empty text: .*; data\.on_bad=drop leaves"
    with open_batches(stream_of(stop, chatml), 4) as source, pytest.raises(ValueError, match=named):
        next(source)
    with pytest.raises(ValueError, match=r"a\.jsonl:6: wrong JSON"):
        load(DataConfig(path, streaming=True, max_length=200), chatml, "sft")
    drop = DataConfig(path, streaming=True, on_bad="drop", shuffle_window=3, max_length=200)
    with open_batches(stream_of(drop, chatml), 2) as source:
        states, whole = [], []
        for _ in range(8):
            states.append(source.state())
            whole += take(source, 1)
    # Windows of 3 end behind lines 3, 8 and (next pass) 1: lines 5 and 6 are met in the second, 11 in the third.
    assert [removed for *_, removed in whole[:4]] == [[], [(5, "problem"), (6, "problem")], [], [(11, "problem")]]
    assert [dropped for *_, dropped, _ in whole[:4]] == [0, 2, 2, 3]
    for position, state in enumerate(states):
        with open_batches(stream_of(drop, chatml), 2) as source:
            source.restore(state)
            assert take(source, 8 - position) == whole[position:]


def test_filters_work_on_streams(chatml, write):
    held = [{"prompt": "Is the sea  DEEP?", "completion": " Yes"}]
    rows = [{"prompt": f"Is the sky blue? {i}", "completion": " a" + " and deep" * i} for i in range(6)]
    config = DataConfig(
        write("train.jsonl", *rows, {"prompt": "Is the sea deep?", "completion": " a and deep"}),
        eval_path=write("eval.jsonl", *held),
        streaming=True,
        shuffle=False,
        shuffle_window=1,
        filters=Filters(decontaminate="exact", min_completion_tokens=3),
    )
    data = load(config, chatml, "sft")
    assert data.report.filters == {"length": 1, "contamination": 1} and data.report.note.startswith("streamed: this")
    with open_batches(stream_of(config, chatml), 5) as source:
        batch = next(source)
        assert [(each.line, each.filter) for each in batch.removed] == [(1, "length")]
        assert next((each.line, each.filter) for each in next(source).removed) == (7, "contamination")


def test_an_example_may_not_fit_and_errors_skip_nothing(chatml, write):
    stream = stream_of(DataConfig(write("a.jsonl", *texts("sky", 6)), streaming=True, shuffle=False), chatml)
    allowed = [False]

    def check(arrays):
        if len(arrays["input_ids"]) > 10 and not allowed[0]:
            raise Bad("longer than a row", "too many")

    with open_batches(stream, 2, check=check) as source:
        with pytest.raises(ValueError, match=r"a\.jsonl:\d: longer than a row: too many"):
            take(source, 9)
        before = source.state()["position"]
        allowed[0] = True
        resumed = take(source, 3)
    with open_batches(stream, 2) as source:
        assert take(source, before + 3)[before:] == resumed


def test_parts_of_which_nothing_can_be_used(chatml, write):
    path = write("a.jsonl", {"text": "The sky"}, *[{"text": ""}] * 3)
    config = DataConfig(path, streaming=True, on_bad="drop", filters=Filters(min_completion_tokens=99))
    stream = inspect(config, chatml, "sft").stream
    assert stream is not None
    named = "a whole pass over it gave nothing that can be used"
    with open_batches(stream) as source, pytest.raises(ValueError, match=named):
        next(source)
    with pytest.raises(ValueError, match=r"empty\.jsonl: no rows"):
        load(DataConfig(write("empty.jsonl", ""), streaming=True), chatml, "sft")


def test_closed_batches_say_so(chatml, write):
    source = open_batches(stream_of(DataConfig(write("a.jsonl", *texts("sky", 6)), streaming=True), chatml))
    next(source)
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        next(source)


def test_the_state_of_something_else(chatml, write):
    with open_batches(stream_of(DataConfig(write("a.jsonl", *texts("sky", 6)), streaming=True), chatml)) as source:
        with pytest.raises(ValueError, match="not the state of a stream: it lacks window, taken, dropped, places"):
            source.restore({"position": 3})
        with pytest.raises(ValueError, match="of a stream of 2 parts; this one has 1"):
            source.restore({**source.state(), "places": np.zeros((2, 6))})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_ratio": 0.1}, "eval_ratio does not go with streaming"),
        ({"split": "train[:10%]"}, "split does not go with streaming"),
        ({"sort_by": "at", "shuffle": False}, "sort_by does not go with streaming"),
        ({"filters": Filters(deduplicate="example")}, r"filters\.deduplicate does not go with streaming"),
        ({"mixture_epoch": "first"}, "mixture_epoch=first does not go with streaming"),
        ({"path": None, "mixture": (MixturePart("a"), MixturePart("b"))}, "mixture without weights does not go with"),
        ({"shuffle_window": 0}, "shuffle_window=0 must be at least 1"),
        ({"stream_sample": 0}, "stream_sample=0 must be at least 1"),
    ],
)
def test_what_a_stream_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"path": "a.jsonl", "streaming": True, **options})


def test_lists_and_folders_cannot_be_streamed(chatml, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(texts("sky", 3)))
    with pytest.raises(ValueError, match=r"a\.json: a JSON list cannot be streamed; write JSON lines"):
        load(DataConfig(str(tmp_path / "a.json"), streaming=True), chatml, "sft")
    with pytest.raises(ValueError, match="a folder cannot be streamed; name its files"):
        load(DataConfig(str(tmp_path), streaming=True), chatml, "sft")
