"""What the tasks do when they run. context.action() imports a module of these when its action runs."""
