from rlhf_trl.cli.main import main

main()
