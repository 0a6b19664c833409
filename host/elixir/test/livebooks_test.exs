defmodule Bridge.LivebooksTest do
  @moduledoc "Every Livebook runs top to bottom in a BEAM of its own, offline, and says what it was stored with."
  use ExUnit.Case, async: true

  alias Bridge.TestLivebook

  @notebooks Path.expand("../../../notebooks", __DIR__)
  @livebooks @notebooks |> Path.join("*.livemd") |> Path.wildcard() |> Enum.sort()

  # What Mix.install compiled is kept between runs: it looks for what is newer by itself.
  defp install, do: Path.join(Mix.Project.build_path(), "livebooks")

  defp page(text) do
    path = Path.join(System.tmp_dir!(), "bridge-page-#{System.pid()}-#{System.unique_integer([:positive])}.livemd")
    File.write!(path, text)
    on_exit(fn -> File.rm!(path) end)
    path
  end

  test "the Livebooks are these" do
    assert Enum.map(@livebooks, &Path.basename/1) ==
             ["dspy_from_livebook.livemd", "kernel_killed.livemd", "prototype_a_tool.livemd"]
  end

  for path <- @livebooks do
    @tag timeout: 300_000
    test "#{Path.basename(path)} runs top to bottom and says what it was stored with" do
      assert TestLivebook.run(unquote(path), install: install()) == :ok
    end

    test "#{Path.basename(path)} shows nothing of a machine" do
      text = File.read!(unquote(path))
      refute text =~ ~r"/(home|root|tmp|work|Users)/|0x[0-9a-f]{6}|#PID|127\.0\.0\.1"
      assert text =~ ~r/\A# \S/
      assert text =~ "Mix.install([\n  {:bridge_host, path: Path.join(__DIR__, \"../host/elixir\")}\n])"
    end
  end

  describe "the runner" do
    test "keeps bindings, aliases and modules from cell to cell, and the page's directory" do
      path =
        page("""
        # A page

        ```elixir
        defmodule Kept, do: def(twice(n), do: 2 * n)
        alias Kept, as: K
        n = 21
        ```

        ```elixir
        true = __DIR__ == "#{System.tmp_dir!()}"
        IO.puts("twenty-one")
        K.twice(n)
        ```

        <!-- livebook:{"output":true} -->

        ```
        twenty-one
        ```

        <!-- livebook:{"output":true} -->

        ```
        42
        ```
        """)

      assert TestLivebook.run(path, []) == :ok
    end

    test "fails on the first error, names its line, and runs nothing after it" do
      path =
        page(
          "# A page\n\n```elixir\n1 + 1\n```\n\n```elixir\nraise \"first\"\n```\n\n```elixir\nraise \"second\"\n```\n"
        )

      assert {:error, text} = TestLivebook.run(path, [])
      assert text =~ ":8: ** (RuntimeError) first"
      refute text =~ "second"
    end

    test "fails on a cell that is marked to raise and does not, or raises another" do
      for source <- ["1", "raise \"no ArgumentError\""] do
        path = page("# A page\n\n```elixir\n# raises: ArgumentError\n#{source}\n```\n")
        assert {:error, text} = TestLivebook.run(path, [])
        assert text =~ "it was to raise ArgumentError"
      end
    end

    test "goes on after a cell that raises as it is marked to" do
      path = page("# A page\n\n```elixir\n# raises: KeyError\nMap.fetch!(%{}, 1)\n```\n\n```elixir\n1 = 1\n```\n")
      assert TestLivebook.run(path, []) == :ok
    end

    test "fails on another output than the stored one, but for what differs from run to run" do
      output = &"# A page\n\n```elixir\n#{&1}\n```\n\n<!-- livebook:{\"output\":true} -->\n\n```\n#{&2}\n```\n"
      assert TestLivebook.run(page(output.("{:took, 1 + 1, :ms}", "{:took, …, :ms}")), []) == :ok
      assert {:error, text} = TestLivebook.run(page(output.("{:took, 1, :ms}", "{:took, …, :s}")), [])
      assert text =~ "its value is:\n{:took, 1, :ms}"
    end

    test "fails when a cell is warned of, ends the BEAM, or kills its own process" do
      for {source, said} <- [
            {"unused = 1\ndefmodule Warned, do: def(f(x), do: 1)", "is warned of"},
            {"System.halt(3)", "the BEAM ended with 3 after 0 of 1 cells"},
            {"Process.exit(self(), :kill)", "the evaluator ended: killed"}
          ] do
        assert {:error, text} = TestLivebook.run(page("# A page\n\n```elixir\n#{source}\n```\n"), [])
        assert text =~ said
      end
    end

    test "refuses what it does not understand: nothing is silently not run" do
      for text <- [
            "```elixir\n1\n",
            "<!-- livebook:{\"branch_parent_index\":1} -->\n\n```elixir\n1\n```\n",
            "<!-- livebook:{\"output\":true} -->\n\n```\nof no cell\n```\n"
          ] do
        assert_raise ArgumentError, fn -> TestLivebook.parse(text) end
      end

      assert_raise ArgumentError, ~r/no cell/, fn -> TestLivebook.run(page("# Prose only\n"), []) end
    end
  end
end
