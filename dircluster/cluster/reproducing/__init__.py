"""Tables and figures of the paper made again: trainings, their judgment, the page."""
