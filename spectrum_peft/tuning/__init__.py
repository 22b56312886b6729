"""The verb `tune`: a model, data and a device's memory in; the best recipe out, found by racing.

settings      what was asked for, checked
splits        rows that train, rows that the search judges by, rows for the end
contestants   who takes part, and at which learning rates
prices        what each needs, by the dry run; what does not fit is left out
schedule      how long runs are and how many there are, within the hours
cells         one run as a cell of a comparison: made, run, forgotten
preparing     what is settled before the first run: split, priced, timed, planned
race          who goes on after a rung, by a test with a stated error: plain decisions on numbers
queue         the runs as trials of Optuna, in a database that several processes share
stages        all of it in order, resumable
recipe        recipe.yaml      report    the winner, the sentence, the page
"""

from .report import finish, summary
from .settings import KEYS, read_tune
from .stages import Tune

__all__ = ["KEYS", "Tune", "finish", "read_tune", "summary"]
