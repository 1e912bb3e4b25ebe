"""Parts of the program that trained the bundled model: its texts, the mixture drawn from them, the optimizer."""
