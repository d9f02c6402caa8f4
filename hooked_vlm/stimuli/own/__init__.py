"""A user's own pictures, questions and answers: read from a table and checked as a whole."""

from hooked_vlm.stimuli.own.data import OwnData as OwnData
from hooked_vlm.stimuli.own.items import OwnItem as OwnItem
