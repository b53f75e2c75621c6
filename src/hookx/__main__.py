from hookx.cli.app import main

main()
