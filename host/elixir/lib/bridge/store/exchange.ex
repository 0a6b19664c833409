defmodule Bridge.Store.Exchange do
  @moduledoc false
  # Export and import: sessions as one JSON file, the same as the Python host's (docs/session-export.schema.json), and
  # back. Secrets are named and never exported; so are tools.

  alias Bridge.{Config, Error, Result, SessionStore}
  alias Bridge.Store.{Commit, Files, Owner, Tables}
  alias Bridge.Store.Exchange.Reader

  @format "bridge.sessions"
  @version 1
  @max_bytes 2 * 1024 * 1024 * 1024

  @doc """
  Writes sessions into one JSON file, mode 0600, whole or not at all.

  `sessions:` the ids of those to export, all of them unless given; `history: true` exports the earlier versions of
  variables too; `bridge:`.
  """
  @spec export(Path.t(), keyword()) :: :ok | {:error, Error.t()}
  def export(path, opts \\ []) do
    with {:ok, cfg} <- Config.fetch(Keyword.get(opts, :bridge, Bridge)),
         {:ok, ids} <- ids(cfg, opts),
         {:ok, sessions} <- Result.map(ids, &written(cfg, &1, Keyword.get(opts, :history, false))) do
      now = SessionStore.tables!(cfg).clock.()

      content = %{
        "format" => @format,
        "version" => @version,
        "exported" => now |> DateTime.from_unix!(:millisecond) |> DateTime.to_iso8601(),
        "bridge" => to_string(Application.spec(:bridge_host, :vsn) || "0.1.0"),
        "sessions" => sessions
      }

      with {:error, reason} <- Files.write(Path.expand(path), Bridge.JSON.encode!(content)) do
        Error.error(:store_failed, "the export was not written: #{path}: #{:file.format_error(reason)}",
          remedy: "See to the directory (is it there?), its permissions and the space, or export to another."
        )
      end
    end
  end

  defp ids(cfg, opts) do
    case Keyword.get(opts, :sessions) do
      nil -> SessionStore.sessions(bridge: cfg.name)
      sessions -> {:ok, Enum.map(sessions, fn session -> if is_binary(session), do: session, else: session.id end)}
    end
  end

  @doc "Adds the sessions of an exported file: all of them or, if one cannot be taken, none. Their ids."
  @spec import(Path.t(), keyword()) :: {:ok, [String.t()]} | {:error, Error.t()}
  def import(path, opts \\ []) do
    with {:ok, cfg} <- Config.fetch(Keyword.get(opts, :bridge, Bridge)),
         {:ok, content} <- read(path),
         {:ok, tables} <- Owner.tables(cfg),
         {:ok, sessions} <- Reader.read(content, cfg.name, tables.clock.()),
         {:ok, _fits} <- Result.map(sessions, &check_size(&1, tables.quota)) do
      Owner.call(cfg, {:take, sessions})
    end
  end

  defp read(path) do
    with {:ok, %{type: :regular, size: size}} when size <= @max_bytes <- File.stat(path),
         {:ok, content} <- File.read(path) do
      {:ok, content}
    else
      {:ok, %{type: :regular, size: size}} ->
        Error.error(:store_damaged, "an export of #{size} bytes is not read: the limit is #{@max_bytes}",
          remedy: "Export fewer sessions at once, or without their history."
        )

      {:ok, _other} ->
        Error.error(:not_found, "#{path} is no file", remedy: "Give the path of an export.")

      {:error, reason} ->
        Error.error(:not_found, "#{path} cannot be read: #{:file.format_error(reason)}",
          remedy: "Give the path of an export."
        )
    end
  end

  defp check_size({id, facts}, quota) do
    latest = for {:variable, _id, name, put} <- facts, into: %{}, do: {name, put}

    sizes =
      Enum.map(latest, fn {_name, put} -> if put.there, do: put.size end) ++
        Enum.map(facts, fn
          {:instance, _id, record} -> Tables.instance_size(record)
          {:function, _id, function} -> byte_size(function.source)
          _other -> nil
        end)

    held = Enum.reject(sizes, &is_nil/1)
    session = %{id: id, things: 0, bytes: 0, deleted: 0}
    with :ok <- Commit.check_quota(quota, session, %{more: length(held), new: 0, bytes: Enum.sum(held)}), do: {:ok, id}
  end

  # -- writing ---------------------------------------------------------------------------------------------------------

  defp written(cfg, id, history?) do
    tables = SessionStore.tables!(cfg)

    with {:ok, session} <- Commit.session(tables, id),
         {:ok, facts} <- facts(cfg, id),
         owned = Enum.group_by(facts, &elem(&1, 0)),
         types = for({:type, _id, name, schema} <- Map.get(owned, :type, []), into: %{}, do: {name, schema}),
         puts = Enum.group_by(Map.get(owned, :variable, []), &elem(&1, 2), &elem(&1, 3)),
         there = for({name, puts} <- puts, List.last(puts).there, do: name),
         names = Enum.sort(Enum.uniq(there ++ Map.keys(types))),
         {:ok, variables} <- Result.map(names, &variable(&1, types, puts, history?)),
         {:ok, instances} <- Result.map(Map.get(owned, :instance, []), fn {_, _, record} -> instance(record) end) do
      {:ok,
       %{
         "id" => id,
         "created" => session.created / 1000,
         "ttl" => session.ttl && session.ttl / 1000,
         "version" => session.version,
         "lm" => lm(session.lm),
         "variables" => variables,
         "instances" => instances,
         "functions" => for({:function, _id, function} <- Map.get(owned, :function, []), do: function(function)),
         "secrets" => for({:secret, _id, name, _sealed} <- Map.get(owned, :secret, []), do: name),
         "tools" => tools(cfg, id)
       }}
    end
  end

  # As they are at one moment: where nothing changes.
  defp facts(cfg, id) do
    Owner.call(
      cfg,
      {:read,
       fn tables ->
         with {:ok, session} <- Commit.session(tables, id), do: {:ok, Tables.session_facts(tables, session)}
       end}
    )
  end

  defp variable(name, types, puts, history?) do
    {earlier, current} =
      case Map.get(puts, name, []) do
        [] -> {[], nil}
        puts -> {Enum.drop(puts, -1), List.last(puts)}
      end

    # A variable that was deleted and has a type has no value.
    current = if current && current.there, do: current
    earlier = if history? and current != nil, do: earlier, else: []

    with {:ok, versions} <- Result.map(earlier ++ List.wrap(current), &version(&1, name)) do
      {history, [current]} = if current, do: Enum.split(versions, -1), else: {[], [nil]}
      {:ok, %{"name" => name, "schema" => types[name], "current" => current, "history" => history}}
    end
  end

  defp version(put, name) do
    with {:ok, value} <- if(put.there, do: value(put.value, put.type, name), else: {:ok, nil}) do
      {:ok,
       %{
         "version" => put.version,
         "at" => put.at,
         "written" => put.written / 1000,
         "value" => value,
         "restores" => put.restores
       }}
    end
  end

  defp value(term, type, path) do
    with {:ok, json, buffers} <- Bridge.Value.encode(term, path) do
      {:ok, %{"type" => type, "json" => json, "buffers" => Enum.map(buffers, &Base.encode64/1)}}
    end
  end

  defp instance(record) do
    state = record.state || %{adapter: "recipe", value: nil, sha256: nil}

    with {:ok, args} <- value(record.args, "list", "args"),
         {:ok, kwargs} <- value(record.kwargs, "dict", "kwargs"),
         {:ok, value} <- value(state.value, Bridge.Store.Plain.type_name(state.value), "state") do
      {:ok,
       %{
         "ref" => record.ref,
         "name" => record.name || "",
         "class" => record.class,
         "args" => args,
         "kwargs" => kwargs,
         "adapter" => state.adapter,
         "state" => value,
         "sha256" => state.sha256,
         "version" => record.version,
         "methods" => record.methods,
         "cache" => record.cache
       }}
    end
  end

  defp function(function) do
    %{
      "name" => function.name,
      "source" => function.source,
      "sha256" => function.hash,
      "lm" => function.lm,
      "secrets" => function.secrets,
      "cache" => function.cache
    }
  end

  defp lm(nil), do: nil

  defp lm(lm) do
    %{
      "model" => lm.model,
      "api_base" => lm.api_base,
      "adapter" => lm.adapter,
      "options" => lm.options
    }
  end

  defp tools(cfg, id) do
    if Process.whereis(Config.process(cfg.name, :tools)) do
      id |> Bridge.Tools.list!(bridge: cfg.name) |> Enum.map(& &1.name) |> Enum.sort()
    else
      []
    end
  end
end
