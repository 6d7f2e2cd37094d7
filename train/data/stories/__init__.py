"""The built-in data: children's stories without end, requests for them, and a score of how well one answers the other.

grammar.py is the language that the texts in the folder storybook are written in, writer.py writes stories with it, and
requests.py asks for them and scores an answer; in conversations.py one request follows another. Everything about a
story follows from its number and split. The rest of the program imports from here alone.
"""
# ruff: noqa: F401

from train.data.stories.conversations import story_conversations
from train.data.stories.requests import (
    StoryRequest,
    StoryScore,
    check_facts,
    forms,
    is_held_out_pair,
    score_story,
    story_requests,
)
from train.data.stories.writer import SPLITS, AskedFacts, Story, split_of, stories, storybook, write_story
