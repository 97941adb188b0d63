"""What a claim about speed or memory is measured with: each module is one command that prints one table."""
