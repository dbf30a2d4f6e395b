"""Language models by name: where they come from, and how they are fetched. No torch here."""
