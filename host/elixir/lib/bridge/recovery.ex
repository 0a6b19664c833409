defmodule Bridge.Recovery do
  @moduledoc false
  # Commands that were interrupted when their host ended: listed, gone on with, dropped.

  alias Bridge.{Config, Error, Journal, Result, SessionStore, Tools}
  alias Bridge.Journal.Entry

  @doc "The commands that were running when the bridge was last stopped, or died, oldest first."
  @spec interrupted(Config.t()) :: [Bridge.Interrupted.t()]
  def interrupted(cfg) do
    for %{id: id} = command <- SessionStore.interrupted(cfg) do
      known = SessionStore.command(cfg, id)
      calls = with {:ok, %{calls: calls}} <- known, do: calls, else: (_unreadable -> [])

      struct!(Bridge.Interrupted,
        id: id,
        session: command.session,
        method: command.method,
        subject: command.subject,
        key: command.key,
        began: command.began,
        attempts: command.attempt,
        callbacks: length(calls),
        readable: match?({:ok, _}, known),
        in_doubt: for(entry <- read(cfg, command, calls), doubtful?(entry), do: doubt(id, entry))
      )
    end
  end

  defp doubtful?(entry), do: entry.lost and entry.effect

  defp doubt(id, entry) do
    %{id: "#{id}:#{entry.n}", tool: hd(entry.asked), call: Journal.shown(entry)}
  end

  @doc """
  What an interrupted command had called back, to go on from.

  `replies` says what a call in doubt returned, by its id; `rerun` names those to be made again. Else `:effect_in_doubt`.
  """
  @spec entries(Config.t(), map(), %{String.t() => term()}, [String.t()]) :: {:ok, [Entry.t()]} | {:error, Error.t()}
  def entries(cfg, command, replies, rerun) do
    entries = read(cfg, command, command.calls)
    entries = Enum.filter(entries, &(&1.reply != nil or &1.versions != nil or &1.lost))
    ids = for entry <- entries, entry.lost, do: "#{command.id}:#{entry.n}"

    case Enum.sort((Map.keys(replies) ++ rerun) -- ids) do
      [] -> decide(entries, command, replies, rerun)
      unknown -> Error.error(:not_found, "command #{command.id} has no call in doubt #{Enum.join(unknown, ", ")}")
    end
  end

  defp decide(entries, command, replies, rerun) do
    Result.map(entries, fn entry ->
      id = "#{command.id}:#{entry.n}"

      cond do
        not entry.lost or id in rerun ->
          {:ok, entry}

        is_map_key(replies, id) ->
          with {:ok, json, buffers} <- Bridge.Value.encode(replies[id], "replies[#{inspect(id)}]") do
            {:ok, %{entry | reply: {:ok, Bridge.JSON.encode!(%{"value" => json}), buffers}, lost: false}}
          end

        entry.effect ->
          message =
            "the host ended while #{Journal.shown(entry)} ran (call #{id}): whether its effect " <>
              "happened is not known"

          Error.error(:effect_in_doubt, message)

        true ->
          {:ok, entry}
      end
    end)
  end

  defp read(cfg, command, calls) do
    for call <- calls do
      {asked, buffers} = call.asked

      entry = %Entry{
        n: call.n,
        seq: call.seq,
        method: call.method,
        asked: asked,
        buffers: buffers,
        effect: call.effect,
        digest: Journal.digest(call.method, asked, buffers),
        sealed?: command.sealed
      }

      case call.reply do
        {:ok, {:versions, versions}} ->
          %{entry | versions: versions}

        {:ok, {:ok, result, more}} ->
          %{entry | reply: {:ok, result, more}}

        {:ok, {:error, error}} ->
          %{entry | reply: {:error, Error.Wire.from_wire(error)}}

        :error when call.method == "tool.call" ->
          %{entry | lost: true, effect: call.effect and not safe?(cfg, command.session, asked)}

        :error ->
          entry
      end
    end
  end

  defp safe?(cfg, session, [name | _]) do
    match?({:ok, %{idempotent: true}}, Tools.fetch(session, name, bridge: cfg.name))
  end

  @doc "The interrupted command of that id, with what it called back."
  @spec find(Config.t(), String.t()) :: {:ok, map()} | {:error, Error.t()}
  def find(cfg, id) do
    case SessionStore.command(cfg, id) do
      {:ok, %{status: :interrupted} = command} ->
        {:ok, command}

      {:error, error} ->
        {:error, error}

      _other ->
        none(cfg, id)
    end
  end

  @doc "That there is none of that id."
  @spec none(Config.t(), String.t()) :: {:error, Error.t()}
  def none(cfg, id) do
    there = for %{id: other} <- SessionStore.interrupted(cfg), other != id, do: other

    Error.error(:not_found, "there is no interrupted command #{inspect(id)}",
      remedy: "There #{if there == [], do: "is none", else: "is #{Enum.join(there, ", ")}"}."
    )
  end
end

defmodule Bridge.Interrupted do
  @moduledoc """
  A command that had begun and not ended when its host did: from `Bridge.interrupted/1`, for `Bridge.resume/2`.

  `in_doubt` are the tools that were running then, whose effect may have happened: `%{id:, tool:, call:}`; `id` is what the
  tool saw as `Bridge.current_call().id`. `began` is in milliseconds since the epoch. `readable` is false if it is sealed
  and the key is gone.
  """

  defstruct [:id, :session, :method, :subject, :key, :began, :attempts, :callbacks, in_doubt: [], readable: true]

  @type t :: %__MODULE__{}
end
