"""Tables as CSV and as LaTeX."""

import csv
import io

from ecg_jax.studies.report.cells import Cell, Table

_ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "\N{EN DASH}": "--", "\N{MINUS SIGN}": "$-$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "≤": r"$\leq$", "±": r"$\pm$", "·": r"$\cdot$", "²": r"$^2$", "µ": r"\textmu{}",
})  # fmt: skip


def to_csv(table: Table) -> str:
    """The table as text; spans are left out, since every column has a name of its own. Numbers keep an ASCII minus."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.head)
    writer.writerows([cell.plain.replace("\N{MINUS SIGN}", "-") for cell in row] for row in table.rows)
    return text.getvalue()


def escape(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return text.translate(_ESCAPES)


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.mark == "best":
        text = rf"\textbf{{{text}}}"
    elif cell.mark == "tied":
        text = rf"\underline{{{text}}}"
    # Braces: a row that begins with a bracket would be read as an argument of the \\ before it.
    return text + (f" {{\\small {escape(cell.interval)}}}" if cell.interval else "")


def to_latex(table: Table) -> str:
    r"""A table for `\input`, with booktabs (`\usepackage{booktabs}`)."""
    columns = "l" * table.text_columns + "r" * (len(table.head) - table.text_columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\label{{tab:{''.join(c if c.isalnum() else '-' for c in table.name)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
    ]
    if table.spans:
        lines.append(
            " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{escape(label)}}}" for label, n in table.spans) + r" \\"
        )
        start = 1
        for label, n in table.spans:
            if label:
                lines.append(rf"\cmidrule(lr){{{start}-{start + n - 1}}}")
            start += n
    lines += [" & ".join(map(escape, table.head)) + r" \\", r"\midrule"]
    for i, row in enumerate(table.rows):
        if i in table.sections:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(_cell, row)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"
