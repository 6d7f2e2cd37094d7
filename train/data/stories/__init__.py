"""The built-in data: children's stories without end, requests for them, and a score of how well one answers the other.

grammar.py is the language that the texts in the folder storybook are written in, writer.py writes stories with it,
requests.py asks for them, and score.py judges an answer. Everything about a story follows from its number and split.
What the rest of the program needs is here.
"""

from train.data.stories.requests import StoryRequest, is_held_out_pair, story_requests
from train.data.stories.score import StoryScore, check_facts, forms, score_story
from train.data.stories.writer import SPLITS, AskedFacts, Story, split_of, stories, storybook, write_story

__all__ = [
    "SPLITS",
    "AskedFacts",
    "Story",
    "StoryRequest",
    "StoryScore",
    "check_facts",
    "forms",
    "is_held_out_pair",
    "score_story",
    "split_of",
    "stories",
    "story_requests",
    "storybook",
    "write_story",
]
