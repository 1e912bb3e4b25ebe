"""The prompts of `weft check`: written for it, of several kinds, so that different parts of a model have to agree."""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "The sea was calm that morning, and the fishermen had already left the harbour when the bell began to ring. Nobody "
    "could say who had rung it, for the tower had been locked since the winter.",
    "Question: A baker sells 14 loaves before noon and twice as many after it. If she baked 50, how many are left?\nAnswer:",
    'def median(values: list[float]) -> float:\n    """The middle value, or the mean of the two middle ones."""\n'
    "    ordered = sorted(values)\n    half = len(ordered) // 2\n    if len(ordered) % 2:\n        return",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "poetry"], "letters": [{"to": "Charles", "year": 1843}, {"to":',
    "Der Zug fuhr langsam durch das Tal, und an jedem Bahnhof stiegen Menschen ein, die nach Regen und Äpfeln rochen. Nach "
    "einer Stunde",
    "Le marché ouvre à six heures. On y trouve du pain, des olives, du fromage de chèvre et, le samedi,",
    "昔々、ある山のふもとに、おじいさんとおばあさんが住んでいました。ある日、",
    "Вечером они сидели у окна и слушали, как ветер гоняет по двору сухие листья.",
    "Ingredients: 2 eggs, 100 g flour, 200 ml milk, a pinch of salt.\n1. Beat the eggs.\n2. Add the flour slowly.\n3.",
    "To: all crew\nSubject: change of course 🌊\n\nFrom 04:00 we steer 275° at 11.5 knots; expect swell of 3-4 m. Please",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
    "She said that he said that she had said that he would say",
    "Why?",
)
