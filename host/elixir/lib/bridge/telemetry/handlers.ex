defmodule Bridge.Telemetry.Handlers do
  @moduledoc false
  # Who wants to hear of events. Where `:telemetry` is loaded it keeps them and calls them; else they are kept here, in a
  # persistent term: read without a copy and without an owner, and changed only when somebody attaches or detaches.

  require Logger

  alias Bridge.Telemetry.Catalogue

  @key __MODULE__

  @type id :: term()

  @doc "Whether `:telemetry` is there; loads it if it can be."
  @spec load() :: boolean()
  def load do
    if Code.ensure_loaded?(:telemetry) do
      # Without its application it has no table. A module of that name without one is the caller's own.
      _started_or_none = Application.ensure_all_started(:telemetry)
      true
    else
      false
    end
  end

  @spec attach(id(), [[atom()]], function(), term()) :: :ok | {:error, :already_exists}
  def attach(id, prefixes, fun, config) do
    names = prefixes |> Enum.flat_map(&Catalogue.matching/1) |> Enum.uniq()

    if load() do
      library(:attach_many, [id, names, fun, config])
    else
      change(fn known -> add(known, id, names, fun, config) end)
    end
  end

  defp add(known, id, names, fun, config) do
    if Enum.any?(known, fn {_name, handlers} -> List.keymember?(handlers, id, 0) end) do
      {{:error, :already_exists}, known}
    else
      added =
        Enum.reduce(names, known, fn name, all ->
          Map.update(all, name, [{id, fun, config}], &(&1 ++ [{id, fun, config}]))
        end)

      {:ok, added}
    end
  end

  @spec detach(id()) :: :ok | {:error, :not_found}
  def detach(id) do
    if load(), do: library(:detach, [id]), else: change(&remove(&1, id))
  end

  defp remove(known, id) do
    left =
      for {name, handlers} <- known, kept = List.keydelete(handlers, id, 0), kept != [], into: %{}, do: {name, kept}

    {if(left == known, do: {:error, :not_found}, else: :ok), left}
  end

  @doc "Tells them; of those that raised, and are detached now, the id and the error's type."
  @spec tell([atom()], map(), map()) :: [{id(), String.t()}]
  def tell(name, measurements, metadata) do
    # Not `Code.ensure_loaded?`: this is asked for each event, and `load/0` was called before.
    if function_exported?(:telemetry, :execute, 3) do
      library(:execute, [name, measurements, metadata])
      []
    else
      case :persistent_term.get(@key, %{}) do
        %{^name => handlers} -> Enum.flat_map(handlers, &call(&1, name, measurements, metadata))
        _nobody -> []
      end
    end
  end

  defp call({id, fun, config}, name, measurements, metadata) do
    fun.(name, measurements, metadata, config)
    []
  catch
    # Somebody else's code: whatever it throws, the command that emitted the event goes on.
    kind, reason ->
      case change(&remove(&1, id)) do
        :ok ->
          said = Exception.format(kind, reason, Bridge.Private.without_arguments(__STACKTRACE__))
          Logger.warning("telemetry handler #{inspect(id)} failed on #{inspect(name)} and was detached:\n" <> said)
          [{id, type(kind, reason)}]

        {:error, :not_found} ->
          []
      end
  end

  defp type(:error, reason), do: inspect(Exception.normalize(:error, reason).__struct__)
  defp type(kind, _reason), do: Atom.to_string(kind)

  @doc "Whose names begin so: `{id, name}` of each."
  @spec list([atom()]) :: [{id(), [atom()]}]
  def list(prefix) do
    for {name, handlers} <- :persistent_term.get(@key, %{}), List.starts_with?(name, prefix), {id, _, _} <- handlers do
      {id, name}
    end
  end

  # Two that change it at once would lose one of the changes.
  defp change(fun) do
    :global.trans(
      {@key, self()},
      fn ->
        known = :persistent_term.get(@key, %{})
        {result, changed} = fun.(known)
        if changed != known, do: :persistent_term.put(@key, changed)
        result
      end,
      [node()]
    )
  end

  # Not `apply` itself with the name in it: compilers warn of a module that is not there.
  defp library(name, arguments, module \\ :telemetry), do: apply(module, name, arguments)
end
