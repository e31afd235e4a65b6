"""The `steps:` of a job file: what is made of the answers before they are written, in this order.

steps:
  - parse:    {json: {score: int64, reason: string}}
  - map:      {function: "acme_checks.score:verify", adds: {correct: bool}}
  - filter:   {where: "correct and score >= 3"}
  - select:   {by: score, keep: 1}
  - explode:  {column: questions, into: question}
  - gather:   {columns: {question: questions}}
  - generate: {column: summary, prompt: {template: "Shorten: {{ generated_text }}"}}
  - judge:    {column: rating, rubric: "Is the summary true?", columns: [generated_text, summary]}
  - embed:    {column: vector, prompt: {prompt_column: summary}}
  - dedup:    {columns: [question]}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from pipelines.answer_parsers import parser_fields
from pipelines.arrow_types import is_list, plain
from pipelines.ask_settings import AskStep, ClassifyStep, EmbedStep, GenerateStep, JudgeStep, ScoreStep
from pipelines.messages import CONVERSATION_TYPE
from pipelines.output_schema import arrow_type_of
from pipelines.settings import Function, Settings, Text

#: Type names that a step may give its columns, besides `list<…>` of one of them.
TYPES: dict[str, pa.DataType] = {
    name: pa.type_for_alias(name)
    for name in ("string", "bool", "int32", "int64", "float32", "float64", "date32", "timestamp[us]")
}
_LIST = re.compile(r"list<(.+)>")


def arrow_type(name: str) -> pa.DataType:
    """The Arrow type that a type name of the job file stands for. Raises ValueError."""
    if inner := _LIST.fullmatch(name):
        return pa.list_(arrow_type(inner.group(1)))
    if name not in TYPES:
        raise ValueError(f"{name!r} is no type; there are {', '.join(TYPES)} and list<…> of one of them")
    return TYPES[name]


def nested_type(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of a column, or of a struct's field (`parsed.questions`); None where there is none."""
    name, *fields = [column] if column in schema.names else column.split(".")
    type_ = schema.field(name).type if name in schema.names else None
    for field in fields:
        if type_ is None or not pa.types.is_struct(type_) or type_.get_field_index(field) < 0:
            return None
        type_ = type_.field(field).type
    return type_


def element_type(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of the elements of a column of lists, named as for `nested_type`; None where there is none."""
    type_ = nested_type(schema, column)
    return type_.value_type if type_ is not None and is_list(type_) else None


def _plain(type_: pa.DataType | None) -> pa.DataType:
    """`plain`, since Parquet has no lists of dictionaries; null for no type."""
    return pa.null() if type_ is None else plain(type_)


def _typed(columns: dict[str, str]) -> dict[str, str]:
    for name in columns.values():
        arrow_type(name)
    return columns


#: What a step may call a column that it adds.
_Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
#: Column → type name.
Columns = Annotated[dict[Text, Text], Field(min_length=1), AfterValidator(_typed)]


class ParseStep(Settings):
    """Take columns out of a text; give exactly one of `json`, `regex`, `xml`."""

    column: Text = "generated_text"
    """The text to read."""
    json_: Annotated[Columns | None, Field(alias="json")] = None
    """Keys of the first JSON object in the text, and their types; JSON's null becomes null."""
    regex: Text | None = None
    """A regular expression with named groups (`(?P<score>\\d+)`), searched for anywhere in the text."""
    types: Annotated[dict[Text, Text], AfterValidator(_typed)] = Field(default_factory=dict)
    """Only for `regex`: types of its groups; string where none is given."""
    xml: Columns | None = None
    """Tags, and the types of what stands between `<tag>` and `</tag>`; the first of each."""
    on_error: Literal["fail", "null", "drop"] = "fail"
    """A text that cannot be read so: the record fails with `parse_error`, keeps nulls, or is dropped."""

    @property
    def adds(self) -> dict[str, str]:
        if self.regex is not None:
            return {name: self.types.get(name, "string") for name in re.compile(self.regex).groupindex}
        return self.json_ or self.xml or {}

    @field_validator("regex")
    @classmethod
    def _has_groups(cls, regex: str | None) -> str | None:
        if regex is not None:
            try:
                groups = re.compile(regex, re.DOTALL).groupindex
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            if not groups:
                raise ValueError("has no named group; write (?P<name>…) around what becomes a column")
        return regex

    @model_validator(mode="after")
    def _one_way(self) -> ParseStep:
        given = [name for name in ("json_", "regex", "xml") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of json, regex, xml")
        if strangers := self.types.keys() - (self.adds if self.regex else {}):
            raise ValueError(f"types: {', '.join(sorted(strangers))}: no group of regex has this name")
        return self


class MapStep(Settings):
    """Call a function of yours for each record."""

    function: Function
    """`package.module:name` of a function `(record: dict) -> dict`, in a package of your own. It returns the columns of
    `adds`; an exception fails the record with `step_error`."""
    adds: Columns
    """The columns that it returns, and their types."""


class FilterStep(Settings):
    """Keep the records for which a condition holds."""

    where: Text
    """As `input.filter`, over all columns that are there by now; a record whose condition is null is dropped."""


class SelectStep(Settings):
    """Keep the best records of each row of the input: of its samples (best of n), or of its elements after an `explode`."""

    by: Text
    """A column of numbers or booleans. Nulls come last, of equal ones the first sample or element."""
    keep: PositiveInt = 1
    """How many records of each row of the input stay; they keep their `row_id` and `sample_index`."""
    order: Literal["largest", "smallest"] = "largest"
    """Which values are the best."""


class ExplodeStep(Settings):
    """Make several records of one, in its place; give exactly one of `column`, `values`, `columns`."""

    column: Text | None = None
    """A column of lists, or a field of a struct that holds them (`parsed.questions`): a record for each element."""
    values: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Texts, the same for all records: a record for each of them, so that later prompts can differ by it."""
    columns: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Columns of one type: a record for the value of each, such as the answers of several models."""
    into: _Name
    """The new column in which each record has its element. All other columns stay as they are, and the `row_id` gets
    the element's place behind it, from 0: `…#7/0`."""
    name_into: _Name | None = None
    """Only for `columns`: a new column with the name of the one that the element is from."""
    on_empty: Literal["drop", "null"] = "drop"
    """Only for `column`. A list without elements, or null instead of a list: the record is dropped, or becomes one whose
    element is null."""

    def adds(self, schema: pa.Schema) -> pa.Schema:
        """The new columns; `null` for a type that cannot be told."""
        if self.values is not None:
            type_: pa.DataType | None = pa.string()
        elif self.columns is not None:
            type_ = schema.field(self.columns[0]).type if self.columns[0] in schema.names else None
        else:
            assert self.column is not None  # _one_source
            type_ = element_type(schema, self.column)
        added = [(self.into, type_ or pa.null())]
        return pa.schema([*added, (self.name_into, pa.string())] if self.name_into else added)

    @model_validator(mode="after")
    def _one_source(self) -> ExplodeStep:
        given = [name for name in ("column", "values", "columns") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of column, values, columns; found {found}")
        for name in ("values", "columns"):
            items = getattr(self, name) or ()
            if len(set(items)) < len(items):
                raise ValueError(f"{name}: each once; found {', '.join(items)}")
        if self.name_into and self.columns is None:
            raise ValueError("name_into: only with columns")
        if self.name_into == self.into:
            raise ValueError(f"name_into: {self.into!r} is the column of the elements; give it another name")
        if "on_empty" in self.model_fields_set and self.column is None:
            raise ValueError("on_empty: only with column")
        return self


class GatherStep(Settings):
    """Make one record of all good records of each row of the input: of its samples, or its elements after an `explode`."""

    columns: Annotated[dict[Text, _Name], Field(min_length=1)]
    """A column, or a field of a struct (`pair.question`) → the new column in which its values are a list, in the order of
    the records. All other columns are those of the first of them, but for the `row_id`: that of the row of the input."""

    @field_validator("columns")
    @classmethod
    def _distinct(cls, columns: dict[str, str]) -> dict[str, str]:
        twice = sorted({name for name in columns.values() if list(columns.values()).count(name) > 1})
        if twice:
            raise ValueError(f"two columns would both become {twice[0]!r}; give each list a name of its own")
        return columns


class DedupStep(Settings):
    """Keep one of equal records, or of similar ones, among all of the job; the last step."""

    columns: Annotated[tuple[Text, ...], Field(min_length=1)]
    """What is compared. `minhash` compares one column of text."""
    method: Literal["exact", "minhash"] = "exact"
    """`exact`: all columns are equal. `minhash`: the texts share most of their word n-grams."""
    normalize: bool = True
    """Compare texts by NFKC, in lower case, with runs of white space as one blank."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Only for `minhash`: from which estimated Jaccard similarity of their n-grams on two texts are duplicates."""
    ngram: PositiveInt = 3
    """Only for `minhash`: words of an n-gram; a shorter text is one n-gram."""
    num_perm: Annotated[int, Field(ge=16, le=1024)] = 128
    """Only for `minhash`: hash functions; the estimate's standard error is at most `0.5 / sqrt(num_perm)`."""

    @model_validator(mode="after")
    def _method_fits(self) -> DedupStep:
        if self.method == "minhash" and len(self.columns) > 1:
            raise ValueError(
                f"minhash compares one column of text, columns names {len(self.columns)}: "
                "name one, or join them into one with a map step"
            )
        strangers = self.model_fields_set & {"threshold", "ngram", "num_perm"}
        if self.method == "exact" and strangers:
            raise ValueError(f"{', '.join(sorted(strangers))}: only for `method: minhash`")
        return self


#: The kinds of steps that ask a model.
ASKING = ("generate", "judge", "embed", "classify", "score")
_KINDS = ("parse", "map", "filter", "select", "explode", "gather", *ASKING, "dedup")


class StepSettings(Settings):
    """One step: exactly one of `parse`, `map`, `filter`, `select`, `explode`, `gather`, `generate`, `judge`, `embed`,
    `classify`, `score`, `dedup`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")] | None = None
    """Stands in the statistics; default: what the step does, with a number where there are several of the kind."""
    parse: ParseStep | None = None
    """Take columns out of a text."""
    map: MapStep | None = None
    """Call a function of yours for each record."""
    filter: FilterStep | None = None
    """Keep the records for which a condition holds."""
    select: SelectStep | None = None
    """Keep the best records of each row of the input."""
    explode: ExplodeStep | None = None
    """Make several records of one: of a list's elements, of variants, of columns."""
    gather: GatherStep | None = None
    """Make one record of all good records of each row of the input."""
    generate: GenerateStep | None = None
    """Ask a model about each record."""
    judge: JudgeStep | None = None
    """Let a model judge each record."""
    embed: EmbedStep | None = None
    """Turn a text of each record into a vector."""
    classify: ClassifyStep | None = None
    """Give each record one of a classifier's labels."""
    score: ScoreStep | None = None
    """Ask a model how likely a given answer is after a prompt."""
    dedup: DedupStep | None = None
    """Keep one of equal or similar records among all of the job."""

    @property
    def kind(self) -> str:
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def asks(self) -> AskStep | None:
        """What a step that asks a model asks; None for the others."""
        return self.generate or self.judge or self.embed or self.classify or self.score

    def asking(self, **update: Any) -> StepSettings:
        """A step that asks a model, with other settings for it."""
        assert self.asks is not None
        return self.model_copy(update={self.kind: self.asks.model_copy(update=update)})

    def adds(self, schema: pa.Schema) -> pa.Schema:
        """The columns that the step adds to records of this schema, all nullable."""
        if self.explode is not None:
            return self.explode.adds(schema)
        if self.gather is not None:
            types = {name: nested_type(schema, column) for column, name in self.gather.columns.items()}
            return pa.schema([(name, pa.list_(_plain(type_))) for name, type_ in types.items()])
        step = self.parse or self.map or self.asks
        added = [(name, arrow_type(kind)) for name, kind in (step.adds if step else {}).items()]
        if self.generate is not None:
            column = self.generate.column
            added += [(f"{column}_{one.name}", one.type) for one in parser_fields(self.generate.sampling)]
        if self.generate and isinstance(schema := self.generate.sampling.output_schema, dict):
            added.append((f"{self.generate.column}_parsed", arrow_type_of(schema)[0]))
        if self.generate and self.generate.conversation is not None:
            added.append((self.generate.conversation, CONVERSATION_TYPE))
        return pa.schema(added)

    @model_validator(mode="after")
    def _one_kind(self) -> StepSettings:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; found {found}")
        return self


def dedup_step(steps: Sequence[StepSettings]) -> DedupStep | None:
    """The `dedup` of a job; None where it has none."""
    return next((step.dedup for step in steps if step.dedup is not None), None)


def step_names(steps: tuple[StepSettings, ...]) -> tuple[str, ...]:
    """The name of each step in statistics: its own, or `parse`, `parse-2` …"""
    names: list[str] = []
    for step in steps:
        plain, number = step.name or step.kind, 1
        name = plain
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return tuple(names)
