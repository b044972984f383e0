"""The page's parts in their order: beside the paper, what the paper could not show, and every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_at_home.reporting import (
    cost,
    facts,
    fidelity_grades,
    figure_memory,
    paper,
    paper_grades,
    planned,
    published,
    scatter,
)
from llm_at_home.reporting.cells import Table
from llm_at_home.reporting.figures import Chart, charts
from llm_at_home.reporting.load import Loaded
from llm_at_home.reporting.marks import Marked
from llm_at_home.reporting.plot import Plot
from llm_at_home.reporting.prices import Prices
from llm_at_home.reporting.radar import Radar, radars
from llm_at_home.reporting.ranks import RankMap, rank_maps

#: Of the tables beyond those of every run.
KEYS = ("table-1", "table-2", "table-3", "table-4", "fidelity-grades", "cost", "planner")
Figure = Chart | Marked | Plot | Radar | RankMap
_NO_RADAR = (
    "No judge has scored answers by category here, so there is nothing to draw: python evaluate.py task=judge. "
    "The paper printed its radars without their numbers, so none are drawn beside."
)
_RADAR = (
    "By category of MT-bench, as the paper’s Figures 2 (bases, single scores), 3 (fine-tuned, pairwise) and 4 "
    "(fine-tuned, single scores). The paper judged with GPT-4 and printed its radars without their numbers, so none "
    "are drawn beside ours; the judge of ours is named in each title, and what it is worth is in the evaluations below."
)


@dataclass(frozen=True)
class Section:
    """One heading with what stands below it; ``notes`` are sentences of their own."""

    key: str
    title: str
    lead: str = ""
    table: Table | None = None
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Sections that answer one question."""

    key: str
    title: str
    sections: tuple[Section, ...]


def build(loaded: Loaded, tables: Sequence[Table], prices: Prices) -> tuple[Part, ...]:
    """All parts, from the records and the tables of every run that were made of them."""
    parts = (
        Part("paper", "Beside the paper", _paper(loaded, tables)),
        Part("beyond", "What the paper could not show", _beyond(loaded, tables, prices)),
        Part("runs", "Every run", tuple(_section(table) for table in tables)),
    )
    return tuple(part for part in parts if part.sections)


def _paper(loaded: Loaded, tables: Sequence[Table]) -> tuple[Section, ...]:
    one, three = paper.tables(loaded)
    two, four = paper_grades.tables(loaded)
    drawn = figure_memory.figure([one, three])
    shown = tuple(chart for table in tables for chart in radars(table))
    made = [
        Section(table.key, table.title, table=table, notes=tuple(published.errata(int(table.key[-1]))))
        for table in (one, two, three, four)
    ]
    made += [Section("figure-1", "Figure 1: memory", figures=(drawn,))] if drawn else []
    made += [Section("figures-2-4", "Figures 2 to 4: radars", _RADAR if shown else _NO_RADAR, figures=shown)]
    return tuple(made)


def _beyond(loaded: Loaded, tables: Sequence[Table], prices: Prices) -> tuple[Section, ...]:
    made = []
    machines = {run.path: facts.machine(run.record) for run in loaded.runs}
    quantization = next((table for table in tables if table.key == "quantization"), None)
    drawn = scatter.fronts(quantization, machines) if quantization else ()
    if drawn:
        lead = (
            "KL divergence from the model’s own unquantized answers, against what was measured of the same model on "
            "the same machine. No front mixes two machines, two cards of one name included."
        )
        made.append(Section("fronts", "Quality against memory and energy", lead, figures=drawn))
    beside = fidelity_grades.table(loaded, paper_grades.tables(loaded)[0])
    made.append(Section(beside.key, beside.title, fidelity_grades.correlations(loaded), beside))
    costs = cost.table(loaded, prices)
    if costs:
        made.append(Section(costs.key, costs.title, table=costs, figures=cost.figure(costs, prices)))
    plan = planned.table(loaded)
    if plan:
        plot = planned.figure(plan)
        made.append(Section(plan.key, plan.title, table=plan, figures=(plot,) if plot else ()))
    return tuple(made)


def _section(table: Table) -> Section:
    return Section(
        table.key,
        table.title,
        table=table,
        figures=(*charts(table), *scatter.plots(table), *rank_maps(table)),
    )
