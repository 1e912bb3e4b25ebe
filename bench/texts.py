"""Texts that benchmarks put before a model, written for this purpose."""

PARAGRAPHS = (
    "The lighthouse stood on the last rock of the island. Every evening the keeper climbed the narrow stair with a can of oil in "
    "his hand, and every morning he came down again and wrote into a book how many ships had passed. In the winter there were "
    "none, and he wrote that too.",
    "My aunt kept bees behind the house, in seven white boxes under the apple trees. She said that a bee never forgets the way "
    "home, and that people could learn from it. When she was ill the whole garden was silent for a week, as if they knew.",
    "The train left the station at ten minutes past six. There were four of us in the carriage: a doctor with a brown bag, a "
    "woman who was knitting, her little boy, and I. Nobody spoke before the river, where the boy saw a boat and cried out.",
    "There was once a king who could not sleep. He sent for the wise men of the country, and they told him to count the stars. "
    "He sent for the old women, and they gave him warm milk. At last a shepherd came and asked him what he was afraid of.",
)

OPENINGS = (
    "It had rained for three days when the stranger came down the road from the hills, and",
    "The captain put the letter into his pocket without a word. Then he looked at the sea and",
    "When I was a child we lived in a house with a green door, near the market, where my father",
    "Once upon a time there was a small dog who wanted to see the world. One morning he",
)
