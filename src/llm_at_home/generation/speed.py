"""Speed figures of replies that were made one by one or in batches."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from llm_at_home.generation.reply import Reply, Stream
from llm_at_home.metering.timing import mean_interval95, percentile
from llm_at_home.records.schema import Reading


def speed_readings(passes: Sequence[Sequence[Sequence[Reply]]]) -> dict[str, Reading]:
    """The mean over passes of each figure, with an interval where there are several passes.

    The clock stands where tokens reach the host, which has waited for the device by then. In a batch, tokens a second
    are those of all its answers together, without padding and without what was decoded after an answer's end; the time
    to the first token and the inter-token latency are those that each answer's reader sees. The method names the batch.

    In a stream the rate is over the time from the first token of all to the last, prompts read in between included, and
    the time to the first token is from the start of the pass that read the prompt, with those read beside it.

    Args:
        passes: over the same questions; each a list of batches, a batch a list of replies.
    """
    method = _method([batch for one in passes for batch in one])

    def figure(values: list[float], unit: str) -> Reading:
        return Reading(statistics.fmean(values), unit, method, interval95=mean_interval95(values), n=len(values))

    timed = [[batch for batch in one if batch[0].time_to_first_token is not None] for one in passes]
    intervals = [[seconds for batch in one for reply in batch for seconds in reply.intervals] for one in timed]
    if not all(intervals):
        return {"decode_tokens_per_second": Reading.unknown("tokens/s", "no answer had two tokens")}
    firsts = [[reply.time_to_first_token or 0.0 for batch in one for reply in batch] for one in timed]
    decode = [_decode_rate(one) for one in timed]
    figures = {
        "time_to_first_token": figure([statistics.fmean(one) for one in firsts], "s"),
        "prefill_tokens_per_second": figure([_prefill_rate(one) for one in timed], "tokens/s"),
        "decode_tokens_per_second": figure(decode, "tokens/s"),
    }
    if len(decode) > 1:
        for name, value in (("median", statistics.median(decode)), ("min", min(decode)), ("max", max(decode))):
            figures[f"decode_tokens_per_second_{name}"] = Reading(value, "tokens/s", method, n=len(decode))
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        figures[f"inter_token_latency_{name}"] = figure([percentile(one, share) for one in intervals], "s")
    return figures


def _method(batches: Sequence[Sequence[Reply]]) -> str:
    places = [batch.places for batch in batches if isinstance(batch, Stream)]
    if places:
        return f"token_on_host_clock_places_{max(places)}"
    largest = max(len(batch) for batch in batches)
    return "token_on_host_clock" if largest == 1 else f"token_on_host_clock_batch_{largest}"


def _prefill_rate(batches: Sequence[Sequence[Reply]]) -> float:
    # A batch's prompts are read at once, a stream's in passes: those of one have their first tokens at the same time.
    passes = [
        {one.first_token_at: one for one in batch}.values() if isinstance(batch, Stream) else batch[:1]
        for batch in batches
    ]
    seconds = sum(reply.time_to_first_token or 0.0 for one in passes for reply in one)
    return sum(reply.prompt_tokens - reply.reused_tokens for batch in batches for reply in batch) / seconds


def _decode_rate(batches: Sequence[Sequence[Reply]]) -> float:
    # A batch decodes as long as its longest answer.
    seconds = sum(
        batch.seconds if isinstance(batch, Stream) else max(sum(reply.intervals) for reply in batch)
        for batch in batches
    )
    return sum(len(reply.intervals) for batch in batches for reply in batch) / seconds
