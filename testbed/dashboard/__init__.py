"""The dashboard: a run live in the browser, or replayed after it has finished."""
