"""The steps of a recipe; ``step`` has their interfaces and maps settings to the step that they configure."""
