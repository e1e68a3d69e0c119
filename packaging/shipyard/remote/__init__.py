"""Train elsewhere: a stage of the line as a SageMaker training job, and its record brought back."""
