"""Forward passes given to the workers of an executor: tasks, the workers' side, and the crew's."""
