"""The steps of a recipe, one module each; ``step_kinds`` maps settings to the step that they configure."""
