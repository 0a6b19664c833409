defmodule Bridge.Options do
  @moduledoc false
  # The options of a function, looked at once: one that is misspelt would do nothing, silently.

  alias Bridge.{Config, Error}

  @doc "The bridge that `opts` name, if they have no other options than that and `more`."
  @spec bridge(term(), [atom()]) :: {:ok, Config.t()} | {:error, Error.t()}
  def bridge(opts, more \\ []) do
    with :ok <- check(opts, [:bridge | more]), do: Config.fetch(Keyword.get(opts, :bridge, Bridge))
  end

  @doc "Whether `opts` are options with some of these names."
  @spec check(term(), [atom()]) :: :ok | {:error, Error.t()}
  def check([], _names), do: :ok

  def check(opts, names) do
    if is_list(opts) and Keyword.keyword?(opts) do
      case Enum.find(opts, fn {name, _value} -> name not in names end) do
        nil -> :ok
        {name, _value} -> Error.error(:invalid_params, "there is no option #{inspect(name)}", remedy: there_are(names))
      end
    else
      shown = inspect(opts, limit: 3, printable_limit: 40)
      remedy = if is_atom(opts), do: "Say which bridge: bridge: #{shown}.", else: there_are(names)
      Error.error(:invalid_params, "options are a keyword list, not #{shown}", remedy: remedy)
    end
  end

  defp there_are(names), do: "There are: #{Enum.map_join(names, ", ", &inspect/1)}."
end
