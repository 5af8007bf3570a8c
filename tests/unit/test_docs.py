from pathlib import Path

from megaseg_dask.settings import options_table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_options_is_the_declaration():
    assert options_table() in (DOCS / "options.md").read_text(), "run: python -m tests.unit.test_docs"


if __name__ == "__main__":
    (DOCS / "options.md").write_text(f"# Options of `segment` and `plan`\n\n{options_table()}\n")
