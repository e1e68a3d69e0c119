"""What the stacks cost: a pure function from synthesized templates, prices and usage to a report."""
