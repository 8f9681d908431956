"""The pretraining ladder: the paper's five sizes, and which partitions of its corpora each is made of (spec §6).

A partition is a site and a year of HEEDB ("S0001-1987"), a year of HEEDB-Emory ("emory-2010"), or all of CODE-15 %
("code15"). The two ladders: `paper` takes the partitions of a rung, so that sizes differ in site and year too; `nested`
takes random patients of everything there is, each rung inside the next, so that sizes differ in size alone.
"""

#: What `config.data.ladder` may be.
LADDERS = ("nested", "paper")

#: Rung -> how many recordings a nested selection of it holds at most; the paper's rungs have about as many. The last
#: one takes everything on either ladder.
SIZES = {"18k": 18_000, "45k": 45_000, "106k": 106_000, "753k": 753_000, "11m": 11_000_000}

#: The rung that takes everything.
EVERYTHING = "11m"

_YEARS = {
    "S0001": (1987, 1988, 1994, 2006, 2007, 2011, 2013, 2015, 2016, 2017, 2018, 2019, 2020, 2021),
    "S0002": (1993, 1997, 1998, 2000, 2003, 2004, 2008, 2009, 2013, 2015, 2016, 2018, 2020, 2022),
    "S0003": (1990, 1994, 2009, 2010, 2013),
    "S0004": (2019,),
    "emory": tuple(range(2010, 2019)),
}

#: Rung -> its partitions. The paper's table calls that of 45k S0001-1990, which none of its configs knows; S0003-1990
#: is the partition of that year.
PARTITIONS = {
    "18k": ("S0001-1987",),
    "45k": ("S0003-1990",),
    "106k": ("S0001-2019",),
    "753k": ("S0001-2007",),
    EVERYTHING: (*(f"{site}-{year}" for site, years in _YEARS.items() for year in years), "code15"),
}


def nested_size(rung: str) -> int | None:
    """How many recordings a nested selection of a rung holds at most; None for everything."""
    return None if rung == EVERYTHING else SIZES[rung]
