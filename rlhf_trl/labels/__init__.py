"""Labels of candidate completions: what is asked, the answers, and the feedback that they become."""
