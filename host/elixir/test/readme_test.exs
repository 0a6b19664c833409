defmodule Bridge.ReadmeTest do
  @moduledoc "The examples of the READMEs run, in order, as whoever follows them would run them."
  use ExUnit.Case, async: true

  alias Bridge.TestLivebook

  @root Path.expand("../../..", __DIR__)

  for page <- ["host/elixir/README.md", "README.md"] do
    @tag timeout: 300_000
    test "the Elixir of #{page} runs top to bottom" do
      install = Path.join(Mix.Project.build_path(), "readme")
      assert TestLivebook.run(Path.join(@root, unquote(page)), cd: @root, install: install) == :ok
    end
  end

  test "an example that is not run says why" do
    text = "<!-- not run: it costs money -->\n```elixir\nraise \"run\"\n```\n\n```elixir\n1\n```\n"
    assert [%{source: "1"}] = TestLivebook.parse(text)

    assert_raise ArgumentError, ~r/the reason/, fn ->
      TestLivebook.parse("<!-- not run:  -->\n```elixir\n1\n```\n")
    end
  end
end
