# A stand-in for Kino, as much of it as Bridge calls: compiled by the tests that want it, and taken away again, for where
# Kino is loaded every bridge shows its commands. What is rendered is sent to the group leader, as Livebook has it.
defmodule Kino do
  def render(term) do
    send(Process.group_leader(), {:kino, :rendered, term})
    term
  end

  def listen(ms, fun) do
    send(Process.group_leader(), {:kino, :listen, ms, fun})
    :ok
  end
end

defmodule Kino.Frame do
  defstruct [:ref, :pid]

  def new do
    leader = Process.group_leader()
    pid = spawn(fn -> loop(leader) end)
    frame = %Kino.Frame{ref: make_ref(), pid: pid}
    send(leader, {:kino, :frame, frame})
    frame
  end

  def render(frame, term) do
    send(frame.pid, {:render, frame, term})
    :ok
  end

  defp loop(leader) do
    receive do
      {:render, frame, term} ->
        send(leader, {:kino, :shown, frame, term})
        loop(leader)

      :cell_runs_anew ->
        :ok
    end
  end
end

defmodule Kino.HTML do
  defstruct [:html]
  def new(html) when is_binary(html), do: %__MODULE__{html: html}
end

defmodule Kino.Markdown do
  defstruct [:text]
  def new(text) when is_binary(text), do: %__MODULE__{text: text}
end

defmodule Kino.Text do
  defstruct [:text]
  def new(text) when is_binary(text), do: %__MODULE__{text: text}
end

defmodule Kino.Image do
  defstruct [:bytes, :mime]
  def new(bytes, mime) when is_binary(bytes), do: %__MODULE__{bytes: bytes, mime: mime}
end

defmodule Kino.Bridge do
  def get_evaluation_file do
    ref = make_ref()
    send(Process.group_leader(), {:io_request, self(), ref, :livebook_get_evaluation_file})

    receive do
      {:io_reply, ^ref, {:error, reason}} -> {:request_error, reason}
      {:io_reply, ^ref, file} -> {:ok, file}
    end
  end
end

defprotocol Kino.Render do
  @fallback_to_any true
  def to_livebook(term)
end

defimpl Kino.Render, for: Any do
  def to_livebook(term), do: {:livebook, term}
end
