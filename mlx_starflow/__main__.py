from mlx_starflow.cli import main

main()
